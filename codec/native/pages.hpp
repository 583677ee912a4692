// Memory by the page from the operating system, given back whole when it is no longer needed. For the large buffers of a
// linear transform: freed and taken again among other objects, they would leave holes in the heap. New pages cost a page
// fault each, so what every short call needs is better taken from the heap.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>
#include <utility>

namespace kvstore {

// Numbers, aligned to a page.
template <class T>
class Pages {
  public:
    Pages() = default;
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;
    ~Pages() { release(); }

    // Room for `count`. What it holds then is zeros, or what it held before. Throws std::bad_alloc.
    void reserve(std::size_t count) {
        const std::size_t bytes = count * sizeof(T);
        if (bytes <= bytes_) return;
        release();
        void* const found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (found == MAP_FAILED) throw std::bad_alloc();
        data_ = static_cast<T*>(found);
        bytes_ = bytes;
    }
    T* data() { return data_; }
    const T* data() const { return data_; }

  private:
    void release() {
        if (data_ != nullptr) munmap(std::exchange(data_, nullptr), std::exchange(bytes_, 0));
    }

    T* data_ = nullptr;
    std::size_t bytes_ = 0;
};

}  // namespace kvstore
