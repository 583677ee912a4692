#include "lossless.hpp"

namespace kvstore {
namespace {

struct FloatBits {
    int exponent_bits, mantissa_bits;
    int plain_bits() const { return 1 + mantissa_bits; }
};

FloatBits float_bits(Dtype dtype) {
    switch (dtype) {
        case Dtype::bfloat16: return {8, 7};
        case Dtype::float16: return {5, 10};
        case Dtype::float32: return {8, 23};
        case Dtype::float8_e4m3fn: return {4, 3};
        default: return {5, 2};
    }
}

u32 load_element(const u8* row, std::size_t index, std::size_t bytes) {
    u32 bits = 0;
    std::memcpy(&bits, row + index * bytes, bytes);
    return bits;
}

// Values of `width` bits, least significant first, without gaps.
class BitWriter {
  public:
    BitWriter(Bytes& out, int width) : out_(out), width_(width) {}
    void put(u32 value) {
        held_ |= static_cast<u64>(value) << bits_;
        for (bits_ += width_; bits_ >= 8; bits_ -= 8, held_ >>= 8) out_.push_back(static_cast<u8>(held_));
    }
    void finish() {
        if (bits_ > 0) out_.push_back(static_cast<u8>(held_));
    }

  private:
    Bytes& out_;
    u64 held_ = 0;
    int width_, bits_ = 0;
};

class BitReader {
  public:
    BitReader(const u8* at, int width) : at_(at), width_(width) {}
    u32 get() {
        for (; bits_ < width_; bits_ += 8) held_ |= static_cast<u64>(*at_++) << bits_;
        const u32 value = static_cast<u32>(held_ & ((u64{1} << width_) - 1));
        held_ >>= width_;
        bits_ -= width_;
        return value;
    }

  private:
    const u8* at_;
    u64 held_ = 0;
    int width_, bits_ = 0;
};

std::size_t packed_bytes(std::size_t count, int width) { return (count * static_cast<std::size_t>(width) + 7) / 8; }

}  // namespace

LosslessCodec::LosslessCodec(LosslessTables tables) : tables_(std::move(tables)) {
    using T = LosslessTables;
    cost_columns_.resize(tables_.costs.size());
    for (std::size_t table = 0; table < T::kTables; ++table)
        for (std::size_t symbol = 0; symbol < T::kSymbols; ++symbol)
            cost_columns_[symbol * T::kTables + table] = tables_.costs[table * T::kSymbols + symbol];
}

// What each table costs with a base, all tables at a time: a symbol's costs lie together (`cost_columns_`).
LosslessCodec::Choice LosslessCodec::choose(const u8* exponents, std::size_t tokens) const {
    using T = LosslessTables;
    std::array<u32, 256> histogram{};
    for (std::size_t token = 0; token < tokens; ++token) ++histogram[exponents[token]];
    std::array<u8, 256> present;
    std::size_t kinds = 0;
    for (std::size_t exponent = 0; exponent < histogram.size(); ++exponent)
        if (histogram[exponent] > 0) present[kinds++] = static_cast<u8>(exponent);
    const int top = present[kinds - 1];
    Choice best;
    i64 best_cost = -1;
    for (int base = top; base > std::max(top - T::kBasesTried, -1); --base) {
        std::array<i64, T::kTables> total{};
        for (std::size_t kind = 0; kind < kinds; ++kind) {
            const int distance = base - present[kind];
            const bool coded = distance >= 0 && distance < T::kEscape;
            const i64* costs = cost_columns_.data() + (coded ? distance : int{T::kEscape}) * T::kTables;
            const i64 count = histogram[present[kind]], extra = coded ? 0 : T::kEscapeCost;
            for (std::size_t table = 0; table < total.size(); ++table) total[table] += count * (costs[table] + extra);
        }
        for (std::size_t table = 0; table < total.size(); ++table)
            if (best_cost < 0 || total[table] < best_cost) {
                best_cost = total[table];
                best = {static_cast<u8>(table), static_cast<u8>(base)};
            }
    }
    return best;
}

std::vector<LosslessCodec::Block> LosslessCodec::blocks(std::span<const u8> tables) {
    std::array<std::vector<u32>, LosslessTables::kTables> by_table;
    for (std::size_t c = 0; c < tables.size(); ++c) by_table[tables[c]].push_back(static_cast<u32>(c));
    std::vector<Block> out;
    Block block{{}, 0};
    for (const auto& list : by_table)
        for (const u32 component : list) {
            block.components[static_cast<std::size_t>(block.lanes)] = component;
            if (++block.lanes == kLanes) {
                out.push_back(block);
                block.lanes = 0;
            }
        }
    if (block.lanes > 0) out.push_back(block);
    return out;
}

Bytes LosslessCodec::encode(std::span<const PlaneView> planes, Dtype dtype) const {
    using T = LosslessTables;
    const FloatBits format = float_bits(dtype);
    const std::size_t tokens = planes.front().tokens, bytes = element_bytes(dtype);
    const u32 mantissa_mask = (1u << format.mantissa_bits) - 1, exponent_mask = (1u << format.exponent_bits) - 1;
    Bytes plain;
    std::vector<u8> exponents;
    for (const PlaneView& plane : planes) {
        const std::size_t first = exponents.size(), channels = plane.channels();
        exponents.resize(first + channels * tokens);
        BitWriter writer(plain, format.plain_bits());
        for (std::size_t token = 0; token < tokens; ++token) {
            const u8* row = plane.row(token);
            for (std::size_t c = 0; c < channels; ++c) {
                const u32 bits = load_element(row, c, bytes);
                exponents[first + c * tokens + token] = static_cast<u8>(bits >> format.mantissa_bits & exponent_mask);
                const u32 sign = bits >> (format.mantissa_bits + format.exponent_bits);
                writer.put(sign << format.mantissa_bits | (bits & mantissa_mask));
            }
        }
        writer.finish();
    }
    const std::size_t components = exponents.size() / tokens;
    std::vector<u8> tables(components), bases(components);
    for (std::size_t c = 0; c < components; ++c) {
        const Choice choice = choose(exponents.data() + c * tokens, tokens);
        tables[c] = choice.table;
        bases[c] = choice.base;
    }
    Bytes out(tables.begin(), tables.end());
    out.insert(out.end(), bases.begin(), bases.end());
    out.insert(out.end(), plain.begin(), plain.end());
    const std::vector<Block> coded = blocks(tables);
    const auto encode_blocks = [&](std::size_t first, std::size_t last, StreamEncoder& encoder) {
        for (std::size_t index = last; index-- > first;) {
            const Block& block = coded[index];
            for (std::size_t token = tokens; token-- > 0;) {
                encoder.reserve_step();
                std::array<std::size_t, kLanes> at;
                for (int lane = block.lanes; lane-- > 0;) {
                    const u32 c = block.components[static_cast<std::size_t>(lane)];
                    const u8 exponent = exponents[c * tokens + token];
                    const int distance = bases[c] - exponent;
                    std::size_t symbol = distance >= 0 && distance < T::kEscape ? static_cast<std::size_t>(distance)
                                                                               : std::size_t{T::kEscape};
                    const std::size_t row = std::size_t{tables[c]} * T::kSymbols;
                    if (tables_.exponents.freq[row + symbol] == 0) symbol = T::kEscape;
                    if (symbol == T::kEscape) encoder.put_raw(exponent);
                    at[static_cast<std::size_t>(lane)] = row + symbol;
                }
                for (int lane = block.lanes; lane-- > 0;) {
                    const std::size_t entry = at[static_cast<std::size_t>(lane)];
                    encoder.put(lane, tables_.exponents.freq[entry], tables_.exponents.start[entry]);
                }
            }
        }
    };
    join_streams(out, coded.size(), static_cast<i64>(exponents.size()), encode_blocks);
    return out;
}

Status LosslessCodec::decode_block(StreamDecoder& stream, const Block& block, std::span<const u8> tables,
                                   std::span<const u8> bases, std::size_t tokens, int exponent_limit,
                                   std::vector<u8>& exponents) const {
    std::array<const u32*, kLanes> slots;
    std::array<u8, kLanes> symbols;
    for (std::size_t l = 0; l < static_cast<std::size_t>(block.lanes); ++l)
        slots[l] = tables_.exponents.slots.data() + std::size_t{tables[block.components[l]]} * kSlots;
    for (std::size_t token = 0; token < tokens; ++token) {
        if (!stream.step(block.lanes, slots.data(), symbols.data())) return Status::stream_ends_early;
        for (std::size_t l = 0; l < static_cast<std::size_t>(block.lanes); ++l) {
            const u32 c = block.components[l];
            int exponent = bases[c] - symbols[l];
            if (symbols[l] == LosslessTables::kEscape) {
                u16 word = 0;
                if (!stream.raw(word)) return Status::stream_ends_early;
                exponent = word;
            }
            if (exponent < 0 || exponent >= exponent_limit) return Status::impossible_exponent;
            exponents[c * tokens + token] = static_cast<u8>(exponent);
        }
    }
    return Status::ok;
}

Status LosslessCodec::decode(ByteView payload, std::span<const PlaneView> planes, Dtype dtype) const {
    const FloatBits format = float_bits(dtype);
    const std::size_t tokens = planes.front().tokens, bytes = element_bytes(dtype);
    std::size_t components = 0, plain_size = 0;
    for (const PlaneView& plane : planes) {
        components += plane.channels();
        plain_size += packed_bytes(tokens * plane.channels(), format.plain_bits());
    }
    if (payload.size() < 2 * components + plain_size) return Status::too_short;
    const ByteView tables = payload.first(components), bases = payload.subspan(components, components);
    const int exponent_limit = 1 << format.exponent_bits;
    for (std::size_t c = 0; c < components; ++c)
        if (tables[c] >= LosslessTables::kTables || bases[c] >= exponent_limit) return Status::unknown_table;
    std::vector<u8> exponents(components * tokens);
    const std::vector<Block> coded = blocks(tables);
    const auto decode_stream = [&](ByteView stream, std::size_t first, std::size_t last) {
        StreamDecoder decoder;
        Status status = decoder.begin(stream);
        for (std::size_t index = first; index < last && status == Status::ok; ++index)
            status = decode_block(decoder, coded[index], tables, bases, tokens, exponent_limit, exponents);
        return status == Status::ok ? decoder.finish() : status;
    };
    if (const Status status = split_streams(payload.subspan(2 * components + plain_size), coded.size(), decode_stream);
        status != Status::ok)
        return status;
    const u8* plain = payload.data() + 2 * components;
    const u8* next = exponents.data();
    const u32 mantissa_mask = (1u << format.mantissa_bits) - 1;
    for (const PlaneView& plane : planes) {
        const std::size_t channels = plane.channels();
        BitReader reader(plain, format.plain_bits());
        for (std::size_t token = 0; token < tokens; ++token) {
            u8* row = plane.row(token);
            for (std::size_t c = 0; c < channels; ++c) {
                const u32 value = reader.get();
                const u32 sign = value >> format.mantissa_bits;
                const u32 bits = sign << (format.mantissa_bits + format.exponent_bits) |
                                 static_cast<u32>(next[c * tokens + token]) << format.mantissa_bits |
                                 (value & mantissa_mask);
                std::memcpy(row + c * bytes, &bits, bytes);
            }
        }
        plain += packed_bytes(tokens * channels, format.plain_bits());
        next += channels * tokens;
    }
    return Status::ok;
}

}  // namespace kvstore
