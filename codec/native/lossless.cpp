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
    explicit BitWriter(int width) : width_(width) {}
    void put(Bytes& out, u32 value) {
        held_ |= static_cast<u64>(value) << bits_;
        for (bits_ += width_; bits_ >= 8; bits_ -= 8, held_ >>= 8) out.push_back(static_cast<u8>(held_));
    }
    void finish(Bytes& out) {
        if (bits_ > 0) out.push_back(static_cast<u8>(held_));
    }

  private:
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

constexpr std::size_t kExponents = 256;

std::size_t components_of(std::span<const PlaneView> planes) {
    std::size_t components = 0;
    for (const PlaneView& plane : planes) components += plane.channels();
    return components;
}

// A plane's rows as exponents and, in `plain`, packed signs and mantissas.
class RowSplitter {
  public:
    RowSplitter(const Kernels& kernels, const PlaneView& plane, FloatBits format, Dtype dtype)
        : kernels_(kernels), plane_(plane), format_(format), dtype_(dtype), bytes_(element_bytes(dtype)),
          row_(plane.channels() * bytes_), writer_(format.plain_bits()) {
        plain_.reserve(packed_bytes(plane.tokens * plane.channels(), format.plain_bits()));
    }
    std::size_t channels() const { return plane_.channels(); }
    // Tokens are read twice: plain bits are kept the first time, in order.
    void read(std::size_t token, i16* exponents) {
        const std::size_t count = channels();
        read_row(plane_, token, bytes_, row_.data());
        const bool keep = token == kept_;
        if (keep) ++kept_;
        if (dtype_ == Dtype::bfloat16) {
            const std::size_t at = plain_.size();
            if (keep) plain_.resize(at + count);
            else scratch_.resize(count);
            kernels_.split_bfloat16(row_.data(), count, exponents, keep ? plain_.data() + at : scratch_.data());
            return;
        }
        const u32 mantissa_mask = (1u << format_.mantissa_bits) - 1, exponent_mask = (1u << format_.exponent_bits) - 1;
        for (std::size_t c = 0; c < count; ++c) {
            const u32 bits = load_element(row_.data(), c, bytes_);
            exponents[c] = static_cast<i16>(bits >> format_.mantissa_bits & exponent_mask);
            const u32 sign = bits >> (format_.mantissa_bits + format_.exponent_bits);
            if (keep) writer_.put(plain_, sign << format_.mantissa_bits | (bits & mantissa_mask));
        }
    }
    void append_plain(Bytes& out) {
        if (dtype_ != Dtype::bfloat16) writer_.finish(plain_);
        out.insert(out.end(), plain_.begin(), plain_.end());
        plain_ = {};
    }

  private:
    const Kernels& kernels_;
    PlaneView plane_;
    FloatBits format_;
    Dtype dtype_;
    std::size_t bytes_, kept_ = 0;
    Bytes row_, plain_, scratch_;
    BitWriter writer_;
};

// The reverse: exponents over packed signs and mantissas, into a plane.
class RowJoiner {
  public:
    RowJoiner(const Kernels& kernels, const PlaneView& plane, FloatBits format, Dtype dtype, const u8* plain)
        : kernels_(kernels), plane_(plane), format_(format), dtype_(dtype), bytes_(element_bytes(dtype)), plain_(plain),
          reader_(plain, format.plain_bits()), row_(plane.channels() * bytes_) {}
    std::size_t channels() const { return plane_.channels(); }
    // The OR of the exponents, which may be out of range.
    u16 write(std::size_t token, const i16* exponents) {
        const std::size_t count = channels();
        if (count == 0) return 0;
        const bool in_place = plane_.whole_rows(bytes_);
        u8* const row = in_place ? plane_.at(token) : row_.data();
        u16 seen = 0;
        if (dtype_ == Dtype::bfloat16) {
            seen = kernels_.join_bfloat16(exponents, plain_, count, row);
            plain_ += count;
        } else {
            const u32 mantissa_mask = (1u << format_.mantissa_bits) - 1, exponent_mask = (1u << format_.exponent_bits) - 1;
            for (std::size_t c = 0; c < count; ++c) {
                const u32 value = reader_.get(), exponent = static_cast<u16>(exponents[c]);
                seen = static_cast<u16>(seen | exponent);
                const u32 bits = (value >> format_.mantissa_bits) << (format_.mantissa_bits + format_.exponent_bits) |
                                 (exponent & exponent_mask) << format_.mantissa_bits | (value & mantissa_mask);
                std::memcpy(row + c * bytes_, &bits, bytes_);
            }
        }
        if (!in_place) write_row(plane_, token, bytes_, row);
        return seen;
    }

  private:
    const Kernels& kernels_;
    PlaneView plane_;
    FloatBits format_;
    Dtype dtype_;
    std::size_t bytes_;
    const u8* plain_;
    BitReader reader_;
    Bytes row_;
};

void read_window(std::span<RowSplitter> splitters, std::size_t first, std::size_t steps, WindowBuffers& buffers) {
    for (std::size_t t = 0; t < steps; ++t) {
        i16* row = buffers.row(t);
        for (RowSplitter& splitter : splitters) {
            splitter.read(first + t, row);
            row += splitter.channels();
        }
    }
}

}  // namespace

LosslessCodec::LosslessCodec(LosslessTables tables, const Kernels& kernels) : tables_(std::move(tables)), kernels_(kernels) {
    using T = LosslessTables;
    cost_columns_.resize(tables_.costs.size());
    for (std::size_t table = 0; table < T::kTables; ++table)
        for (std::size_t symbol = 0; symbol < T::kSymbols; ++symbol)
            cost_columns_[symbol * T::kTables + table] = tables_.costs[table * T::kSymbols + symbol];
}

// What each table costs with a base, all tables at a time: a symbol's costs lie together (`cost_columns_`).
LosslessCodec::Choice LosslessCodec::choose(const u32* histogram) const {
    using T = LosslessTables;
    std::array<u8, kExponents> present;
    std::size_t kinds = 0;
    for (std::size_t exponent = 0; exponent < kExponents; ++exponent)
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

ClassPlan LosslessCodec::plan(std::span<const u8> tables, std::span<const u8> bases) const {
    using T = LosslessTables;
    std::array<std::vector<u32>, T::kTables> by_table;
    for (std::size_t c = 0; c < tables.size(); ++c) by_table[tables[c]].push_back(static_cast<u32>(c));
    ClassPlan plan;
    Block block{{}, 0, 0};
    ValueLanes lanes;
    const auto close = [&] {
        plan.blocks.push_back(block);
        plan.values.push_back(lanes);
        block.lanes = 0;
        lanes = {};
    };
    for (std::size_t table = 0; table < by_table.size(); ++table)
        for (const u32 c : by_table[table]) {
            const auto l = static_cast<std::size_t>(block.lanes);
            block.components[l] = c;
            lanes.slots[l] = static_cast<i32>(table * kSlots);
            lanes.codes[l] = static_cast<i32>(table * T::kSymbols);
            lanes.add[l] = bases[c];
            lanes.count = ++block.lanes;
            if (block.lanes == kLanes) close();
        }
    if (block.lanes > 0) close();
    plan.counts[0] = plan.blocks.size();
    return plan;
}

Bytes LosslessCodec::encode(std::span<const PlaneView> planes, Dtype dtype, Workspace& workspace) const {
    const FloatBits format = float_bits(dtype);
    const std::size_t tokens = planes.front().tokens;
    const std::size_t components = components_of(planes);
    WindowBuffers buffers(workspace, components);
    std::vector<u32> histograms(components * kExponents);
    Bytes out(2 * components);
    std::vector<RowSplitter> splitters;
    for (const PlaneView& plane : planes) splitters.emplace_back(kernels_, plane, format, dtype);
    for (std::size_t first = 0; first < tokens; first += kWindow) {
        const std::size_t steps = std::min(kWindow, tokens - first);
        read_window(splitters, first, steps, buffers);
        for (std::size_t t = 0; t < steps; ++t)
            for (std::size_t c = 0; c < components; ++c) ++histograms[c * kExponents + static_cast<u8>(buffers.row(t)[c])];
    }
    for (std::size_t c = 0; c < components; ++c) {
        const Choice choice = choose(histograms.data() + c * kExponents);
        out[c] = choice.table;
        out[components + c] = choice.base;
    }
    for (RowSplitter& splitter : splitters) splitter.append_plain(out);
    const ClassPlan coded = plan({out.data(), components}, {out.data() + components, components});
    WindowEncoder encoder(workspace, kernels_, alphabet(), {&coded, nullptr}, {tokens, 0}, 1);
    for (std::size_t first = (tokens - 1) / kWindow * kWindow;; first -= kWindow) {
        const std::size_t steps = std::min(kWindow, tokens - first);
        read_window(splitters, first, steps, buffers);
        encoder.previous(0, static_cast<int>(steps), buffers);
        if (first == 0) break;
    }
    encoder.finish(0, out);
    return out;
}

Status LosslessCodec::decode(ByteView payload, std::span<const PlaneView> planes, Dtype dtype, Workspace& workspace) const {
    const FloatBits format = float_bits(dtype);
    const std::size_t tokens = planes.front().tokens;
    const std::size_t components = components_of(planes);
    std::size_t plain_size = 0;
    for (const PlaneView& plane : planes) plain_size += packed_bytes(tokens * plane.channels(), format.plain_bits());
    if (payload.size() < 2 * components + plain_size) return Status::too_short;
    const ByteView tables = payload.first(components), bases = payload.subspan(components, components);
    const int limit = 1 << format.exponent_bits;
    for (std::size_t c = 0; c < components; ++c)
        if (tables[c] >= LosslessTables::kTables || bases[c] >= limit) return Status::unknown_table;
    const ClassPlan coded = plan(tables, bases);
    WindowDecoder decoder(workspace, kernels_, alphabet(), {&coded, nullptr}, {tokens, 0}, components);
    const ByteView section = payload.subspan(2 * components + plain_size);
    if (const Status status = decoder.open({&section, 1}); status != Status::ok) return status;
    std::vector<RowJoiner> joiners;
    const u8* plain = payload.data() + 2 * components;
    for (const PlaneView& plane : planes) {
        joiners.emplace_back(kernels_, plane, format, dtype, plain);
        plain += packed_bytes(tokens * plane.channels(), format.plain_bits());
    }
    WindowBuffers buffers(workspace, components);
    for (std::size_t first = 0; first < tokens; first += kWindow) {
        const std::size_t steps = std::min(kWindow, tokens - first);
        if (const Status status = decoder.next(0, static_cast<int>(steps), buffers); status != Status::ok) return status;
        u16 seen = 0;
        std::size_t at = 0;
        for (RowJoiner& joiner : joiners) {
            for (std::size_t t = 0; t < steps; ++t) seen |= joiner.write(first + t, buffers.row(t) + at);
            at += joiner.channels();
        }
        if (seen >= limit) return Status::impossible_exponent;
    }
    return decoder.finish();
}

}  // namespace kvstore
