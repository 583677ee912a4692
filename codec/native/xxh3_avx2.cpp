// Blocks of XXH3-64 in AVX2; also what AVX-512 machines use, since memory is slower than this.
#include "xxh3.hpp"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include <immintrin.h>

namespace kvstore {
namespace avx2 {
namespace {

#define KVSTORE_TARGET __attribute__((target("avx2")))
using namespace xxh3_detail;

enum class Copy { none, cached, around };

KVSTORE_TARGET inline __m256i load_half(const u8* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

// One half of a stripe: where the copy goes to is aligned to 16 bytes if it goes around the caches.
template <Copy Kind>
KVSTORE_TARGET inline void accumulate(__m256i& lanes, const u8* from, const u8* keys, u8* to) {
    const __m256i value = load_half(from);
    if constexpr (Kind == Copy::cached) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value);
    if constexpr (Kind == Copy::around) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(value));
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + 16), _mm256_extracti128_si256(value, 1));
    }
    const __m256i key = _mm256_xor_si256(value, load_half(keys));
    const __m256i product = _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32));
    lanes = _mm256_add_epi64(lanes, _mm256_add_epi64(product, _mm256_shuffle_epi32(value, _MM_SHUFFLE(1, 0, 3, 2))));
}

KVSTORE_TARGET inline __m256i scrambled(__m256i lanes, const u8* keys) {
    const __m256i prime = _mm256_set1_epi32(static_cast<int>(kPrime32));
    const __m256i mixed = _mm256_xor_si256(_mm256_xor_si256(lanes, _mm256_srli_epi64(lanes, 47)), load_half(keys));
    const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(mixed, 32), prime);
    return _mm256_add_epi64(_mm256_mul_epu32(mixed, prime), _mm256_slli_epi64(high, 32));
}

template <Copy Kind>
KVSTORE_TARGET void hash(u64* lanes, const u8* from, std::size_t blocks, u8* to) {
    auto* const vectors = reinterpret_cast<__m256i*>(lanes);
    __m256i a = _mm256_loadu_si256(vectors), b = _mm256_loadu_si256(vectors + 1);
    for (std::size_t block = 0; block < blocks; ++block) {
        for (std::size_t stripe = 0; stripe < kStripes; ++stripe, from += 64) {
            _mm_prefetch(reinterpret_cast<const char*>(from) + 512, _MM_HINT_T0);
            const u8* const keys = kSecret.data() + 8 * stripe;
            accumulate<Kind>(a, from, keys, to);
            accumulate<Kind>(b, from + 32, keys + 32, Kind == Copy::none ? nullptr : to + 32);
            if constexpr (Kind != Copy::none) to += 64;
        }
        a = scrambled(a, kSecret.data() + 128);
        b = scrambled(b, kSecret.data() + 160);
    }
    _mm256_storeu_si256(vectors, a);
    _mm256_storeu_si256(vectors + 1, b);
    if constexpr (Kind == Copy::around) _mm_sfence();
}

}  // namespace

void hash_blocks(u64* lanes, const u8* from, std::size_t blocks, u8* to, Stores stores) {
    if (to == nullptr) return hash<Copy::none>(lanes, from, blocks, to);
    if (stores == Stores::around_caches && reinterpret_cast<std::uintptr_t>(to) % 16 == 0)
        return hash<Copy::around>(lanes, from, blocks, to);
    hash<Copy::cached>(lanes, from, blocks, to);
}

}  // namespace avx2
}  // namespace kvstore

#endif
