// XXH3-64 (github.com/Cyan4973/xxHash, its document xxhash_spec.md), the checksum of every segment, over bytes that lie in
// pieces, copied as they are read.
//
// READ ME FIRST
//  * Input longer than 240 bytes is read in blocks of 1024, 16 stripes of 64 each; lanes are scrambled after a block only if
//    more input follows, and the last stripe is the last 64 bytes whatever was read of them before. So the last block, and
//    64 bytes before it, are held back until there is more, or no more.
//  * Blocks are the inner loop: `Kernels::hash_blocks`. Held-back bytes are copied once more, at most 1 KiB a piece.
#pragma once

#include "kernels.hpp"

namespace kvstore {

class Xxh3 {
  public:
    explicit Xxh3(const Kernels& kernels) : kernels_(kernels) {}

    // The next `count` bytes of the input, copied to `to` where it is not null.
    void add(const u8* from, std::size_t count, u8* to = nullptr, Stores stores = Stores::cached);
    // Of the whole input; ends it.
    u64 digest();

  private:
    static constexpr std::size_t kBlock = 1024, kStripe = 64;

    u8* held() { return held_.data() + kStripe; }

    const Kernels& kernels_;
    u64 length_ = 0;
    std::size_t held_count_ = 0;
    alignas(64) std::array<u64, 8> lanes_ = kLanesAtStart;
    // The stripe before those bytes, and the bytes that are held back.
    alignas(64) std::array<u8, kStripe + kBlock> held_;

    static constexpr std::array<u64, 8> kLanesAtStart{0xC2B2AE3D,         0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F,
                                                      0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x85EBCA77,
                                                      0x27D4EB2F165667C5, 0x9E3779B1};
};

inline u64 xxh3(const Kernels& kernels, ByteView bytes) {
    Xxh3 hash(kernels);
    hash.add(bytes.data(), bytes.size());
    return hash.digest();
}

namespace xxh3_detail {
inline constexpr u32 kPrime32 = 0x9E3779B1;
inline constexpr std::size_t kStripes = 16;  // of a block
// Default secret of XXH3.
extern const std::array<u8, 192> kSecret;
}  // namespace xxh3_detail

}  // namespace kvstore
