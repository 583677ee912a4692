#include "xxh3.hpp"

#include <bit>

namespace kvstore {

namespace xxh3_detail {

alignas(64) const std::array<u8, 192> kSecret{
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

}  // namespace xxh3_detail

namespace {

using namespace xxh3_detail;

constexpr u64 kPrime1 = 0x9E3779B185EBCA87, kPrime2 = 0xC2B2AE3D27D4EB4F, kPrime3 = 0x165667B19E3779F9;
constexpr u64 kMix1 = 0x165667919E3779F9, kMix2 = 0x9FB21C651E98DF25;
constexpr std::size_t kShortMax = 240;

u64 secret(std::size_t at) { return load<u64>(kSecret.data() + at); }

u64 folded_product(u64 a, u64 b) {
    __extension__ using u128 = unsigned __int128;
    const u128 product = static_cast<u128>(a) * b;
    return static_cast<u64>(product) ^ static_cast<u64>(product >> 64);
}

u64 avalanche(u64 hash) {
    hash = (hash ^ hash >> 37) * kMix1;
    return hash ^ hash >> 32;
}

u64 avalanche_of_few(u64 hash) {
    hash = (hash ^ hash >> 33) * kPrime2;
    hash = (hash ^ hash >> 29) * kPrime3;
    return hash ^ hash >> 32;
}

u64 mix16(const u8* in, std::size_t at) {
    return folded_product(load<u64>(in) ^ secret(at), load<u64>(in + 8) ^ secret(at + 8));
}

u64 hash_16(const u8* in, std::size_t length) {
    if (length > 8) {
        const u64 low = load<u64>(in) ^ secret(24) ^ secret(32), high = load<u64>(in + length - 8) ^ secret(40) ^ secret(48);
        return avalanche(length + __builtin_bswap64(low) + high + folded_product(low, high));
    }
    if (length >= 4) {
        u64 hash = (load<u32>(in + length - 4) + (static_cast<u64>(load<u32>(in)) << 32)) ^ secret(8) ^ secret(16);
        hash = (hash ^ std::rotl(hash, 49) ^ std::rotl(hash, 24)) * kMix2;
        hash = (hash ^ ((hash >> 35) + length)) * kMix2;
        return hash ^ hash >> 28;
    }
    if (length == 0) return avalanche_of_few(secret(56) ^ secret(64));
    const u32 word = static_cast<u32>(in[0]) << 16 | static_cast<u32>(in[length / 2]) << 24 | in[length - 1] |
                     static_cast<u32>(length) << 8;
    return avalanche_of_few(word ^ load<u32>(kSecret.data()) ^ load<u32>(kSecret.data() + 4));
}

u64 hash_240(const u8* in, std::size_t length) {
    if (length <= 16) return hash_16(in, length);
    u64 hash = length * kPrime1;
    if (length <= 128) {
        for (std::size_t i = 0; 32 * i < length; ++i)
            hash += mix16(in + 16 * i, 32 * i) + mix16(in + length - 16 * (i + 1), 32 * i + 16);
        return avalanche(hash);
    }
    for (std::size_t i = 0; i < 8; ++i) hash += mix16(in + 16 * i, 16 * i);
    hash = avalanche(hash);
    for (std::size_t i = 8; i < length / 16; ++i) hash += mix16(in + 16 * i, 16 * (i - 8) + 3);
    return avalanche(hash + mix16(in + length - 16, 119));
}

void accumulate_stripe(u64* lanes, const u8* in, const u8* keys) {
    for (std::size_t i = 0; i < 8; ++i) {
        const u64 value = load<u64>(in + 8 * i), key = value ^ load<u64>(keys + 8 * i);
        lanes[i ^ 1] += value;
        lanes[i] += (key & 0xFFFFFFFF) * (key >> 32);
    }
}

}  // namespace

namespace scalar {
void hash_blocks(u64* lanes, const u8* from, std::size_t blocks, u8* to, Stores) {
    for (std::size_t block = 0; block < blocks; ++block, from += 64 * kStripes) {
        for (std::size_t stripe = 0; stripe < kStripes; ++stripe)
            accumulate_stripe(lanes, from + 64 * stripe, kSecret.data() + 8 * stripe);
        for (std::size_t i = 0; i < 8; ++i) lanes[i] = (lanes[i] ^ lanes[i] >> 47 ^ secret(128 + 8 * i)) * kPrime32;
        if (to != nullptr) to = static_cast<u8*>(std::memcpy(to, from, 64 * kStripes)) + 64 * kStripes;
    }
}
}  // namespace scalar

void Xxh3::add(const u8* from, std::size_t count, u8* to, Stores stores) {
    if (count == 0) return;
    length_ += count;
    const auto take = [&](std::size_t bytes) {
        std::memcpy(held() + held_count_, from, bytes);
        if (to != nullptr) to = static_cast<u8*>(std::memcpy(to, held() + held_count_, bytes)) + bytes;
        held_count_ += bytes;
        from += bytes;
        count -= bytes;
    };
    if (count <= kBlock - held_count_) return take(count);
    if (held_count_ > 0) {
        take(kBlock - held_count_);
        kernels_.hash_blocks(lanes_.data(), held(), 1, nullptr, stores);
        std::memcpy(held_.data(), held() + kBlock - kStripe, kStripe);
        held_count_ = 0;
    }
    if (const std::size_t blocks = (count - 1) / kBlock; blocks > 0) {
        kernels_.hash_blocks(lanes_.data(), from, blocks, to, stores);
        from += blocks * kBlock;
        count -= blocks * kBlock;
        if (to != nullptr) to += blocks * kBlock;
        std::memcpy(held_.data(), from - kStripe, kStripe);
    }
    take(count);
}

u64 Xxh3::digest() {
    if (length_ <= kShortMax) return hash_240(held(), static_cast<std::size_t>(length_));
    const std::size_t stripes = (held_count_ - 1) / kStripe;
    for (std::size_t stripe = 0; stripe < stripes; ++stripe)
        accumulate_stripe(lanes_.data(), held() + kStripe * stripe, kSecret.data() + 8 * stripe);
    accumulate_stripe(lanes_.data(), held() + held_count_ - kStripe, kSecret.data() + 121);
    u64 hash = length_ * kPrime1;
    for (std::size_t i = 0; i < 4; ++i)
        hash += folded_product(lanes_[2 * i] ^ secret(11 + 16 * i), lanes_[2 * i + 1] ^ secret(11 + 16 * i + 8));
    return avalanche(hash);
}

}  // namespace kvstore
