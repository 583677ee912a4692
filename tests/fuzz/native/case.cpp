#include "case.hpp"

#include <cstdio>
#include <cstdlib>

namespace kvstore::fuzz {
namespace {

constexpr std::size_t kElementsMax = 2048, kElementsMaxLarge = 40960;
constexpr std::size_t kPageTokens = 3, kFirstToken = 1, kGap = 3;
constexpr unsigned kMemories = 5, kProfiles = 3, kFills = 4, kWithBasis = 2;
enum Memory : unsigned { contiguous, gaps, every_other, paged, heads_outside };
enum Fill : unsigned { any_bits, finite, same_for_all, some_quiet };

// All but the exponent's upper bit, so that magnitudes stay below 2; and all but four of the exponent's upper bits.
u32 finite_mask(Dtype dtype) {
    switch (dtype) {
        case Dtype::float32: return 0xBFFFFFFFu;
        case Dtype::bfloat16:
        case Dtype::float16: return 0xBFFFu;
        default: return 0xBFu;
    }
}
u32 quiet_mask(Dtype dtype) {
    switch (dtype) {
        case Dtype::float32: return 0x87FFFFFFu;
        case Dtype::bfloat16:
        case Dtype::float16: return 0x87FFu;
        default: return 0x87u;
    }
}

}  // namespace

void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "FINDING: %s\n", what);
    std::abort();
}

std::size_t Case::channels() const {
    std::size_t sum = 0;
    for (const auto& [heads, dim] : shapes) sum += heads * dim;
    return sum;
}

std::vector<Bytes> Case::payloads(int count) const {
    std::vector<Bytes> out;
    ByteView left = rest;
    for (int level = 0; level < count; ++level) {
        const bool last = level + 1 == count;
        const std::size_t length = last ? left.size() : std::min(lengths[static_cast<std::size_t>(level)], left.size());
        out.emplace_back(left.begin(), left.begin() + static_cast<std::ptrdiff_t>(length));
        left = left.subspan(length);
    }
    return out;
}

Bytes Case::values() const {
    const std::size_t bytes = element_bytes(dtype), given = rest.size() / bytes;
    Bytes out(tokens * channels() * bytes);
    std::size_t at = 0, first = 0;
    for (const auto& [heads, dim] : shapes) {
        for (std::size_t token = 0; token < tokens; ++token)
            for (std::size_t c = 0; c < heads * dim; ++c, ++at) {
                u32 bits = 0;
                const std::size_t from = fill == same_for_all ? first + c : at;
                if (given > 0) std::memcpy(&bits, rest.data() + from % given * bytes, bytes);
                if (fill != any_bits) bits &= finite_mask(dtype);
                if (fill == some_quiet && token % 7 == 3) bits &= quiet_mask(dtype);
                std::memcpy(out.data() + at * bytes, &bits, bytes);
            }
        first += heads * dim;
    }
    return out;
}

std::vector<u16> Case::drain_tokens() const {
    std::vector<u16> listed;
    if (drains % 3 == 2 && !rest.empty())
        for (std::size_t token = sinks; token < tokens; ++token)
            if (rest[token % rest.size()] & 1) listed.push_back(static_cast<u16>(token));
    return listed;
}

double Case::step_factor() const { return std::ldexp(0.75, static_cast<int>(drains / 3 % 17) - 8); }

std::optional<Case> read_case(ByteView data, unsigned dtypes) {
    if (data.size() < Case::kHeaderBytes) return std::nullopt;
    Case out;
    out.dtype = static_cast<Dtype>(data[0] % dtypes);
    out.levels = 1 + data[1] % 3;
    for (std::size_t plane = 0; plane < 1u + data[8] % 4; ++plane)
        out.shapes.push_back({1u + data[9 + 2 * plane] % 8, data[10 + 2 * plane] % 65u});
    const std::size_t elements = data[18] >> 4 == 0xF ? kElementsMaxLarge : kElementsMax;
    out.tokens = std::min<std::size_t>(1 + data[2], std::max<std::size_t>(1, elements / std::max<std::size_t>(1, out.channels())));
    out.sinks = std::min<std::size_t>(data[3] % 5, out.tokens);
    out.memory = data[4] % kMemories;
    out.profile = data[5] % kProfiles;
    out.seed = data[6];
    out.rotation = data[7];
    out.quarters = static_cast<std::int8_t>(data[17]);
    out.fill = data[18] % kFills;
    out.drains = data[19];
    out.lengths = {load<u16>(data.data() + 20), load<u16>(data.data() + 22)};
    out.rest = data.subspan(Case::kHeaderBytes);
    return out;
}

Planes::Planes(const Case& input, u8 background) : bytes_(element_bytes(input.dtype)), background_(background) {
    const std::size_t page_count = (kFirstToken + input.tokens + kPageTokens - 1) / kPageTokens;
    for (std::size_t page = 0; page < page_count; ++page) pages_.push_back(static_cast<i64>(page_count - page));
    for (const auto& [heads, dim] : input.shapes) {
        PlaneView view;
        view.tokens = input.tokens;
        view.heads = heads;
        view.dim = dim;
        const std::size_t channels = heads * dim, apart = input.memory == every_other ? 2 : 1;
        std::size_t token_stride = channels * apart, head_stride = dim * apart;
        if (input.memory == gaps) token_stride += kGap;
        if (input.memory == heads_outside) token_stride = dim, head_stride = dim * input.tokens;
        std::size_t last = (input.tokens - 1) * token_stride;  // the element at which the last token begins
        if (input.memory == paged) {
            view.pages = pages_.data();
            view.page_tokens = kPageTokens;
            view.first_token = kFirstToken;
            view.page_stride = static_cast<std::ptrdiff_t>(kPageTokens * channels * bytes_);
            last = (page_count + 1) * kPageTokens * channels - channels;
        }
        const std::size_t elements = channels == 0 ? 0 : last + (heads - 1) * head_stride + (dim - 1) * apart + 1;
        view.token_stride = static_cast<std::ptrdiff_t>(token_stride * bytes_);
        view.head_stride = static_cast<std::ptrdiff_t>(head_stride * bytes_);
        view.dim_stride = static_cast<std::ptrdiff_t>(apart * bytes_);
        view.data = memory_.emplace_back(elements * bytes_, background).data();
        views_.push_back(view);
    }
}

void Planes::write(const Bytes& values) {
    const u8* from = values.data();
    for (const PlaneView& view : views_)
        for (std::size_t token = 0; token < view.tokens; ++token, from += view.channels() * bytes_)
            write_row(view, token, bytes_, from);
}

Bytes Planes::read(std::size_t sinks) const {
    Bytes out;
    for (const PlaneView& view : views_)
        for (std::size_t token = 0; token < view.tokens; ++token) {
            const std::size_t at = out.size();
            out.resize(at + view.channels() * bytes_);
            if (token >= sinks) read_row(view, token, bytes_, out.data() + at);
        }
    return out;
}

void Planes::require_gaps_kept() const {
    for (std::size_t p = 0; p < views_.size(); ++p) {
        const PlaneView& view = views_[p];
        std::vector<char> inside(memory_[p].size());
        for (std::size_t token = 0; token < view.tokens && view.channels() > 0; ++token)
            for (std::size_t head = 0; head < view.heads; ++head)
                for (std::size_t d = 0; d < view.dim; ++d) {
                    const u8* element = view.at(token) + static_cast<std::ptrdiff_t>(head) * view.head_stride +
                                        static_cast<std::ptrdiff_t>(d) * view.dim_stride;
                    std::fill_n(inside.begin() + (element - view.data), bytes_, 1);
                }
        for (std::size_t i = 0; i < inside.size(); ++i)
            require(inside[i] || memory_[p][i] == background_, "memory beside the plane was written");
    }
}

// Formulas that Python computes alike; what they are does not matter, except that a profile may hold them.
Segment::Segment(const Case& input, const Planes& planes) {
    for (std::size_t p = 0; p < planes.views().size(); ++p) {
        const PlaneView& view = planes.views()[p];
        CodedPlane coded{view, {}, input.step_factor()};
        const std::size_t pairs = input.rotation & 4 ? std::min<std::size_t>(1, view.dim / 2) : view.dim / 2;
        std::vector<float>& cos = cosines_.emplace_back();
        std::vector<float>& sin = sines_.emplace_back();
        if (p % 2 == 0 && input.rotation & 1) {
            for (std::size_t token = 0; token < view.tokens; ++token)
                for (std::size_t pair = 0; pair < pairs; ++pair) {
                    cos.push_back((token + pair) % 3 ? 0.6f : 0.8f);
                    sin.push_back((token + pair) % 3 ? 0.8f : -0.6f);
                }
            coded.rotation = {cos.data(), sin.data(), pairs, (input.rotation & 2) != 0};
        }
        segment_.planes.push_back(coded);
    }
    segment_.step_quarters = input.profile ? input.quarters : 0;
    if (input.profile) add_profile(input);
}

void Segment::add_profile(const Case& input) {
    const std::size_t channels = input.channels(), s = input.seed;
    const bool extreme = s >= 128, basis = input.profile == kWithBasis;
    const std::size_t components = basis ? channels - channels * (s % 4) / 4 : channels;
    for (std::size_t c = 0; c < channels; ++c) {
        mean_.push_back((static_cast<float>((5 * c + s) % 17) - 8.0f) * (extreme ? 0x1p57f : 0.25f));
        weight_.push_back(std::ldexp(1.0f, (static_cast<int>((7 * c + s) % 9) - 4) * (extreme ? 10 : 1)));
    }
    for (std::size_t j = 0; j < components; ++j) {
        scale_ids_.push_back(static_cast<u8>((11 * j + s) % 64));
        for (std::size_t c = 0; basis && c < channels; ++c)
            basis_.push_back(float_to_float16((static_cast<float>((31 * j + 17 * c + 7 * s) % 13) - 6.0f) * (extreme ? 8192.0f : 0.125f)));
    }
    basis_.reserve(1);  // an empty basis is one all the same
    profile_ = {mean_.data(), weight_.data(), basis ? basis_.data() : nullptr, scale_ids_.data(), channels, components};
    segment_.profile = &profile_;
}

Outcome lossy_outcome(Status status, const Planes& planes, const Case& input) {
    planes.require_gaps_kept();
    if (status == Status::ok) return {status, planes.read()};
    if (status == Status::stream_end && input.profile != kWithBasis) return {status, planes.read(input.sinks)};
    return {status, {}};
}

Outcome lossless_outcome(Status status, const Planes& planes) {
    planes.require_gaps_kept();
    if (status == Status::ok || status == Status::stream_end) return {status, planes.read()};
    return {status, {}};
}

bool must_decode() {
    static const bool set = std::getenv("KVSTORE_FUZZ_MUST_DECODE") != nullptr;
    return set;
}

}  // namespace kvstore::fuzz
