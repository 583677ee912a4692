// Independent jobs on a few threads of the call's own: the caller's thread and threads − 1 more, which end with the call.
//
// READ ME FIRST
//  * Jobs share nothing but what they only read. The first exception of any is thrown again by the caller's thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace kvstore {

// `job(index, workspace)`: each thread has a Workspace of its own, which one job leaves to the next.
template <class Workspace, class Job>
void parallel_for(std::size_t count, std::size_t threads, const Job& job) {
    std::atomic<std::size_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error;
    const auto work = [&] {
        try {
            Workspace workspace;
            for (std::size_t index; !failed && (index = next++) < count;) job(index, workspace);
        } catch (...) {
            if (!failed.exchange(true)) error = std::current_exception();
        }
    };
    std::vector<std::thread> others;
    for (std::size_t t = 1; t < std::min(threads, count); ++t) {
        try {
            others.emplace_back(work);
        } catch (const std::system_error&) {
            break;  // no more threads to be had: the work is done by those there are
        }
    }
    work();
    for (std::thread& other : others) other.join();
    if (error) std::rethrow_exception(error);
}

}  // namespace kvstore
