// 32 interleaved rANS lanes over one stream of 16-bit words (FORMAT.md §3, reference/rans.py).
//
// READ ME FIRST
//  * The encoder runs backwards: it is given the steps in reverse decoding order and writes words from the end.
//  * A state is in [2^16, 2^32); with 12-bit frequencies one word refills it, so a symbol takes at most one.
//  * An rANS decoder accepts any bits. Being in range at the end is a check, the segment's checksum is the proof.
// Source: J. Duda, "Asymmetric numeral systems" (2013); interleaving as in F. Giesen's ryg_rans.
#pragma once

#include <algorithm>

#include "core.hpp"

namespace kvstore {

// Frequencies of `tables` alphabets of `symbols` symbols, and what decoding a slot needs, packed:
// symbol << 24 | (frequency − 1) << 12 | (slot − start).
struct SlotTable {
    std::size_t symbols = 0;
    std::vector<u16> freq, start;
    std::vector<u32> codes;  // both: frequency | start << 16
    std::vector<u32> slots;

    // `frequencies` is [tables, symbols]; false unless every row sums to 2^12 and every symbol fits a byte.
    bool build(std::span<const u16> frequencies, std::size_t symbol_count, bool with_slots) {
        symbols = symbol_count;
        freq.assign(frequencies.begin(), frequencies.end());
        start.resize(freq.size());
        codes.resize(freq.size());
        const std::size_t tables = freq.size() / symbols;
        if (with_slots) slots.resize(tables * kSlots);
        for (std::size_t table = 0; table < tables; ++table) {
            u32 at = 0;
            for (std::size_t symbol = 0; symbol < symbols; ++symbol) {
                const std::size_t index = table * symbols + symbol;
                start[index] = static_cast<u16>(at);
                codes[index] = freq[index] | at << 16;
                if (at + freq[index] > kSlots) return false;
                if (with_slots) {
                    for (u32 bias = 0; bias < freq[index]; ++bias) {
                        slots[table * kSlots + at + bias] =
                            static_cast<u32>(symbol) << 24 | (freq[index] - 1u) << kSlotBits | bias;
                    }
                }
                at += freq[index];
            }
            if (at != kSlots) return false;
        }
        return symbols <= 256;
    }
};

class StreamEncoder {
  public:
    StreamEncoder() { states_.fill(kStateMin); }

    // Call before each step (all lanes' symbols and raw words): makes room for its words.
    void reserve_step() {
        if (words_.size() - count_ < 2 * kLanes) words_.resize(2 * words_.size() + 8192);
    }
    // Branch-free: whether a lane gives up a word is as good as random.
    void put(int lane, u32 freq, u32 start) {
        u32 x = states_[static_cast<std::size_t>(lane)];
        const bool full = x >= static_cast<u64>(freq) << 20;
        words_[count_] = static_cast<u16>(x);
        count_ += full;
        x >>= full ? 16 : 0;
        states_[static_cast<std::size_t>(lane)] = (x / freq << kSlotBits) + x % freq + start;
    }
    void put_raw(u16 word) { words_[count_++] = word; }

    // For vector code, which keeps the states in registers: up to 32 words at a time are written at `room`.
    std::array<u32, kLanes>& states() { return states_; }
    u16* room() { return words_.data() + count_; }
    void added(std::size_t words) { count_ += words; }

    // Appends states and words, in decoding order; returns the number of words.
    u32 finish(Bytes& out) const {
        for (u32 state : states_) append(out, state);
        const std::size_t at = out.size();
        out.resize(at + 2 * count_);
        u8* to = out.data() + at;
        for (std::size_t word = count_; word-- > 0; to += 2) std::memcpy(to, &words_[word], 2);
        return static_cast<u32>(count_);
    }

  private:
    std::array<u32, kLanes> states_;
    std::vector<u16> words_;
    std::size_t count_ = 0;
};

// Must not be copied once begun: it may point into itself.
class StreamDecoder {
  public:
    static constexpr std::size_t kStepBytesMax = 4 * kLanes;  // a refill and a raw word for each lane

    // `stream` is at least 128 bytes and even (split_streams made it so).
    Status begin(ByteView stream) {
        std::memcpy(states_.data(), stream.data(), 4 * kLanes);
        at_ = stream.data() + 4 * kLanes;
        end_ = stream.data() + stream.size();
        const std::size_t last = std::min(stream.size() - 4 * kLanes, kStepBytesMax);
        tail_end_ = tail_.data() + last;
        if (last > 0) std::memcpy(tail_.data(), end_ - last, last);
        if (last < kStepBytesMax) at_ = enter_tail(at_);
        return std::all_of(states_.begin(), states_.end(), [](u32 x) { return x >= kStateMin; }) ? Status::ok
                                                                                                 : Status::state_range;
    }
    // Symbols of the first `lanes` lanes; lane l's table of 4096 entries begins at slots[offsets[l]].
    bool step(int lanes, const u32* slots, const i32* offsets, u8* symbols) {
        for (int lane = 0; lane < lanes; ++lane) {
            const u32 x = states_[static_cast<std::size_t>(lane)];
            const u32 entry = slots[static_cast<u32>(offsets[lane]) + (x & (kSlots - 1))];
            symbols[lane] = static_cast<u8>(entry >> 24);
            states_[static_cast<std::size_t>(lane)] =
                ((entry >> kSlotBits & (kSlots - 1)) + 1) * (x >> kSlotBits) + (entry & (kSlots - 1));
        }
        return refill(lanes);
    }
    // Digits 0…2 of alphabets of three: where lane l's second and third symbol start.
    bool step3(int lanes, const u16* seconds, const u16* thirds, u8* symbols) {
        for (int lane = 0; lane < lanes; ++lane) {
            const u32 x = states_[static_cast<std::size_t>(lane)];
            const u32 slot = x & (kSlots - 1), second = seconds[lane], third = thirds[lane];
            const u32 symbol = static_cast<u32>(slot >= second) + static_cast<u32>(slot >= third);
            const u32 start = symbol == 0 ? 0 : symbol == 1 ? second : third;
            const u32 end = symbol == 0 ? second : symbol == 1 ? third : kSlots;
            symbols[lane] = static_cast<u8>(symbol);
            states_[static_cast<std::size_t>(lane)] = (end - start) * (x >> kSlotBits) + slot - start;
        }
        return refill(lanes);
    }
    bool raw(u16& word) {
        if (end_ - at_ < 2) return false;
        word = load<u16>(at_);
        at_ += 2;
        return true;
    }
    // For vector code, which keeps the states in registers and moves on by itself.
    std::array<u32, kLanes>& states() { return states_; }
    const u8* position() const { return at_; }
    // It may read 128 bytes a step, so it goes over to a copy of the last 128 that has zeros after them. A step may start
    // at a position before `limit()`, or else where `enter_tail` says; null: the stream is at its end, or beyond.
    const u8* limit() const { return end_ == tail_end_ ? end_ + 1 : end_ - kStepBytesMax; }
    const u8* enter_tail(const u8* at) {
        if (end_ == tail_end_) return nullptr;
        const std::ptrdiff_t left = end_ - at;
        end_ = tail_end_;
        return end_ - left;
    }
    // False where it has read beyond the end.
    bool move_to(const u8* at) {
        at_ = at;
        return at_ <= end_;
    }

    Status finish() const {
        const bool even = at_ == end_ && std::all_of(states_.begin(), states_.end(), [](u32 x) { return x == kStateMin; });
        return even ? Status::ok : Status::stream_end;
    }

  private:
    bool refill(int lanes) {
        if (end_ - at_ >= 2 * kLanes) {  // branch-free while a step cannot overrun the words
            const u8* at = at_;
            for (int lane = 0; lane < lanes; ++lane) {
                u32& x = states_[static_cast<std::size_t>(lane)];
                const bool low = x < kStateMin;
                const u32 filled = x << 16 | load<u16>(at);
                x = low ? filled : x;
                at += 2 * low;
            }
            at_ = at;
            return true;
        }
        for (int lane = 0; lane < lanes; ++lane) {
            u32& x = states_[static_cast<std::size_t>(lane)];
            if (x < kStateMin) {
                u16 word = 0;
                if (!raw(word)) return false;
                x = x << 16 | word;
            }
        }
        return true;
    }

    std::array<u32, kLanes> states_{};
    const u8* at_ = nullptr;
    const u8* end_ = nullptr;
    const u8* tail_end_ = nullptr;
    std::array<u8, 2 * kStepBytesMax> tail_{};
};

// Stream `index`'s share of `items` among `count` streams: [first, last).
struct Deal {
    std::size_t first, last;
};
inline Deal deal(std::size_t items, std::size_t count, std::size_t index) {
    return {index * items / count, (index + 1) * items / count};
}

// The encoder's choice. Two streams are decoded in lockstep, which hides latency; the states of one are 128 bytes.
inline std::size_t stream_count(std::size_t blocks, i64 symbols) {
    const i64 wanted = std::max<i64>(symbols >= kStreamPairSymbols ? 2 : 1, symbols / kStreamSymbols);
    return std::min(blocks, static_cast<std::size_t>(wanted));
}

// Writes a streams section.
inline void join_streams(Bytes& out, std::span<const StreamEncoder> streams) {
    append(out, static_cast<u16>(streams.size()));
    std::size_t lengths = out.size();
    out.resize(lengths + 4 * streams.size());
    for (const StreamEncoder& stream : streams) {
        const u32 words = stream.finish(out);
        std::memcpy(out.data() + lengths, &words, 4);
        lengths += 4;
    }
}

// Opens the streams of a streams section, which must fill `payload`.
inline Status split_streams(ByteView payload, std::size_t blocks, std::vector<StreamDecoder>& streams) {
    if (payload.size() < 2) return Status::too_short;
    const std::size_t count = load<u16>(payload.data());
    std::size_t at = 2 + 4 * count;
    if (count > blocks || (count == 0) != (blocks == 0) || payload.size() < at) return Status::stream_count;
    streams.resize(count);
    for (std::size_t index = 0; index < count; ++index) {
        const std::size_t length = 4 * kLanes + 2 * static_cast<std::size_t>(load<u32>(payload.data() + 2 + 4 * index));
        if (length > payload.size() - at) return Status::stream_length;
        if (const Status status = streams[index].begin(payload.subspan(at, length)); status != Status::ok) return status;
        at += length;
    }
    return at == payload.size() ? Status::ok : Status::bytes_left_over;
}

inline Status finish_streams(std::span<const StreamDecoder> streams) {
    for (const StreamDecoder& stream : streams)
        if (const Status status = stream.finish(); status != Status::ok) return status;
    return Status::ok;
}

}  // namespace kvstore
