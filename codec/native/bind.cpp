// Python bindings: with bind_raw.cpp, the only files that know of Python. Check types and shapes, release the GIL, call the core.
#include "bind_planes.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <string>

#include "lossless.hpp"
#include "lossy.hpp"
#include "parallel.hpp"

namespace {

using FloatTable = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using FloatArray = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using U8Array = nb::ndarray<const u8, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using U16Array = nb::ndarray<const u16, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using U16Table = nb::ndarray<const u16, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using I32Table = nb::ndarray<const i32, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using DoubleArray = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rotations = std::optional<std::tuple<FloatTable, FloatTable, bool>>;
// (plane, rotation, step factor)
using CodedArgument = std::tuple<PlaneArgument, Rotations, double>;
// (mean, weight, basis, scale ids)
using ProfileArgument = std::tuple<FloatArray, FloatArray, std::optional<U16Table>, U8Array>;
// (planes, drain tokens, or none: to be found by the encoder; profile, step exponent)
using SegmentArgument = std::tuple<std::vector<CodedArgument>, std::optional<U16Array>, std::optional<ProfileArgument>, int>;
using LayerArgument = std::tuple<PlaneArgument, PlaneArgument>;

// numpy's and ml_dtypes' name of a DLPack element type; "" for one that kvstore does not store.
std::string dtype_name(nb::dlpack::dtype type) {
    if (type.lanes != 1) return "";
    enum : u8 { Int = 0, UInt = 1, Float = 2, Bfloat = 4, Float8E4M3FN = 10, Float8E5M2 = 12 };
    switch (type.code) {
        case Int: return "int" + std::to_string(type.bits);
        case UInt: return "uint" + std::to_string(type.bits);
        case Float: return "float" + std::to_string(type.bits);
        case Bfloat: return type.bits == 16 ? "bfloat16" : "";
        case Float8E4M3FN: return "float8_e4m3fn";
        case Float8E5M2: return "float8_e5m2";
        default: return "";
    }
}

std::pair<std::string, nb::object> view_bits(nb::ndarray<nb::device::cpu> array) {
    const std::string name = dtype_name(array.dtype());
    const u8 bits = array.dtype().bits;
    if (name.empty() || (bits != 8 && bits != 16 && bits != 32)) return {"", nb::none()};
    std::vector<std::size_t> shape(array.ndim());
    std::vector<i64> strides(array.ndim());
    for (std::size_t axis = 0; axis < array.ndim(); ++axis) {
        shape[axis] = array.shape(axis);
        strides[axis] = array.stride(axis);
    }
    const nb::dlpack::dtype type{static_cast<u8>(nb::dlpack::dtype_code::UInt), bits, 1};
    nb::ndarray<nb::numpy> view(array.data(), array.ndim(), shape.data(), nb::find(array), strides.data(), type);
    return {name, nb::cast(view)};
}

void check_same_tokens(std::span<const PlaneView> planes, std::size_t sinks) {
    if (planes.empty()) throw nb::value_error("a segment has at least one plane");
    for (const PlaneView& plane : planes)
        if (plane.tokens != planes.front().tokens || sinks > plane.tokens)
            throw nb::value_error("planes of a segment have the same tokens, sinks among them");
}

std::vector<PlaneView> plane_views(const std::vector<PlaneArgument>& arguments, Dtype dtype) {
    std::vector<PlaneView> planes;
    for (const PlaneArgument& argument : arguments) planes.push_back(plane_view(argument, element_bytes(dtype)));
    check_same_tokens(planes, 0);
    return planes;
}

// A segment and the profile that it may point at.
struct HeldSegment {
    LossySegment segment;
    GroupProfile profile;
};

// In place, since the segment points into its holder.
void hold(const SegmentArgument& argument, std::size_t sinks, Dtype dtype, HeldSegment& held) {
    const auto& [planes, drains, profile, step_quarters] = argument;
    std::vector<PlaneView> views;
    for (const auto& [plane, rotation, step_factor] : planes) {
        CodedPlane coded{plane_view(plane, element_bytes(dtype)), {}, step_factor};
        if (rotation) {
            const auto& [cos, sin, interleaved] = *rotation;
            if (cos.shape(0) != coded.plane.tokens || sin.shape(0) != cos.shape(0) || cos.shape(1) != sin.shape(1) ||
                2 * cos.shape(1) > coded.plane.dim)
                throw nb::value_error("rotation tables must be [tokens, pairs] with 2 * pairs <= dim");
            coded.rotation = {cos.data(), sin.data(), cos.shape(1), interleaved};
        }
        views.push_back(coded.plane);
        held.segment.planes.push_back(coded);
    }
    check_same_tokens(views, sinks);
    held.segment.find_drains = !drains;
    if (drains) held.segment.drains = {drains->data(), drains->size()};
    const std::span<const u16> listed = held.segment.drains;
    for (std::size_t i = 0; i < listed.size(); ++i)
        if (listed[i] < sinks || listed[i] >= views.front().tokens || (i > 0 && listed[i] <= listed[i - 1]))
            throw nb::value_error("drain tokens must ascend, after the sinks");
    if (held.segment.find_drains && views.size() % 2 != 0) throw nb::value_error("drain tokens need K and V of each layer");
    if (step_quarters < -128 || step_quarters > 127) throw nb::value_error("the step exponent has eight bits");
    held.segment.step_quarters = step_quarters;
    if (!profile) return;
    const auto& [mean, weight, basis, scale_ids] = *profile;
    held.profile = {mean.data(), weight.data(), basis ? basis->data() : nullptr, scale_ids.data(), mean.size(), scale_ids.size()};
    const bool fits = weight.size() == mean.size() && mean.size() == held.segment.channels() &&
                      (basis ? basis->shape(0) == scale_ids.size() && basis->shape(1) == mean.size() : scale_ids.size() == mean.size());
    if (!fits) throw nb::value_error("a profile's arrays must fit its planes");
    for (std::size_t j = 0; j < scale_ids.size(); ++j)
        if (scale_ids.data()[j] > LossyTables::kScaleIdMax)
            throw nb::value_error("scale ids are 0 to 63");
    held.segment.profile = &held.profile;
}

std::vector<HeldSegment> hold_all(const std::vector<SegmentArgument>& arguments, std::size_t sinks, Dtype dtype) {
    std::vector<HeldSegment> held(arguments.size());
    for (std::size_t s = 0; s < arguments.size(); ++s) hold(arguments[s], sinks, dtype, held[s]);
    return held;
}

// The first that is not ok.
Status worst_of(std::span<const Status> statuses) {
    for (const Status status : statuses)
        if (status != Status::ok) return status;
    return Status::ok;
}

// Names of the instruction sets that can be used, by number; the last is the best.
std::vector<std::pair<int, std::string>> instruction_sets() {
    std::vector<std::pair<int, std::string>> found;
    for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512})
        if (const Kernels* kernels = kernels_for(isa)) found.emplace_back(static_cast<int>(isa), kernels->name);
    return found;
}

nb::bytes to_bytes(const Bytes& bytes) { return nb::bytes(bytes.data(), bytes.size()); }

SlotTable slot_table(const U16Table& frequencies, bool with_slots) {
    SlotTable table;
    if (!table.build({frequencies.data(), frequencies.size()}, frequencies.shape(1), with_slots))
        throw nb::value_error("frequencies must sum to 4096");
    return table;
}

// Both codecs with their tables; immutable, shared by all threads.
class Coder {
  public:
    Coder(const U16Table& values, const U16Table& digits, const FloatTable& shrinkage, const DoubleArray& thresholds,
          const DoubleArray& variances, const U16Table& exponents, const I32Table& costs, int isa)
        : lossy_(lossy_tables(values, digits, shrinkage, thresholds, variances), kernels_or_throw(isa),
                 static_cast<gemm::Isa>(isa)),
          lossless_(lossless_tables(exponents, costs), kernels_or_throw(isa)) {
        if (!gemm::supported(static_cast<gemm::Isa>(isa))) throw nb::value_error("this CPU lacks the instruction set");
    }

    std::vector<nb::ndarray<nb::numpy, u16, nb::ndim<1>>> drain_tokens(const std::vector<std::vector<LayerArgument>>& groups,
                                                                       std::size_t sinks, int dtype, std::size_t threads) const {
        const Dtype type = static_cast<Dtype>(dtype);
        std::vector<std::vector<DrainLayer>> layers(groups.size());
        for (std::size_t g = 0; g < groups.size(); ++g) {
            std::vector<PlaneView> views;
            for (const auto& [k, v] : groups[g]) {
                layers[g].push_back({plane_view(k, element_bytes(type)), plane_view(v, element_bytes(type))});
                views.push_back(layers[g].back().k);
                views.push_back(layers[g].back().v);
            }
            check_same_tokens(views, sinks);
        }
        std::vector<std::vector<u16>> found(groups.size());
        {
            nb::gil_scoped_release release;
            parallel_for<Workspace>(groups.size(), threads, [&](std::size_t g, Workspace&) { found[g] = lossy_.drain_tokens(layers[g], sinks, type); });
        }
        std::vector<nb::ndarray<nb::numpy, u16, nb::ndim<1>>> out;
        for (std::vector<u16>& tokens : found) {
            auto* kept = new std::vector<u16>(std::move(tokens));
            nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<u16>*>(p); });
            out.emplace_back(kept->data(), std::initializer_list<std::size_t>{kept->size()}, owner);
        }
        return out;
    }

    std::pair<int, std::vector<std::vector<nb::bytes>>> encode_lossy(const std::vector<SegmentArgument>& arguments,
                                                                     std::size_t sinks, int dtype, int levels,
                                                                     std::size_t threads) const {
        const Dtype type = static_cast<Dtype>(dtype);
        check_lossy(type, levels);
        const std::vector<HeldSegment> segments = hold_all(arguments, sinks, type);
        std::vector<std::vector<Bytes>> payloads(segments.size());
        std::vector<Status> statuses(segments.size(), Status::ok);
        {
            nb::gil_scoped_release release;
            parallel_for<Workspace>(segments.size(), threads, [&](std::size_t s, Workspace& workspace) {
                statuses[s] = lossy_.encode(segments[s].segment, sinks, type, levels, workspace, payloads[s]);
            });
        }
        const Status status = worst_of(statuses);
        std::vector<std::vector<nb::bytes>> out;
        for (std::size_t s = 0; s < segments.size() && status == Status::ok; ++s) {
            out.emplace_back();
            for (const Bytes& payload : payloads[s]) out.back().push_back(to_bytes(payload));
        }
        return {static_cast<int>(status), std::move(out)};
    }

    int decode_lossy(const std::vector<SegmentArgument>& arguments, const std::vector<std::vector<Payload>>& payloads,
                     std::size_t sinks, int dtype, std::size_t threads) const {
        const Dtype type = static_cast<Dtype>(dtype);
        if (payloads.size() != arguments.size()) throw nb::value_error("one list of payloads a segment");
        const std::vector<HeldSegment> segments = hold_all(arguments, sinks, type);
        std::vector<std::vector<ByteView>> views(segments.size());
        for (std::size_t s = 0; s < segments.size(); ++s) {
            check_lossy(type, static_cast<int>(payloads[s].size()));
            for (const Payload& payload : payloads[s]) views[s].emplace_back(payload.data(), payload.size());
        }
        std::vector<Status> statuses(segments.size(), Status::ok);
        nb::gil_scoped_release release;
        parallel_for<Workspace>(segments.size(), threads, [&](std::size_t s, Workspace& workspace) {
            statuses[s] = lossy_.decode(segments[s].segment, views[s], sinks, type, workspace);
        });
        return static_cast<int>(worst_of(statuses));
    }

    std::vector<nb::bytes> encode_lossless(const std::vector<std::vector<PlaneArgument>>& arguments, int dtype,
                                           std::size_t threads) const {
        const Dtype type = static_cast<Dtype>(dtype);
        std::vector<std::vector<PlaneView>> segments;
        for (const auto& planes : arguments) segments.push_back(plane_views(planes, type));
        std::vector<Bytes> payloads(segments.size());
        {
            nb::gil_scoped_release release;
            parallel_for<Workspace>(segments.size(), threads, [&](std::size_t s, Workspace& workspace) {
                payloads[s] = lossless_.encode(segments[s], type, workspace);
            });
        }
        std::vector<nb::bytes> out;
        for (const Bytes& payload : payloads) out.push_back(to_bytes(payload));
        return out;
    }

    int decode_lossless(const std::vector<std::vector<PlaneArgument>>& arguments, const std::vector<Payload>& payloads, int dtype,
                        std::size_t threads) const {
        const Dtype type = static_cast<Dtype>(dtype);
        if (payloads.size() != arguments.size()) throw nb::value_error("one payload a segment");
        std::vector<std::vector<PlaneView>> segments;
        for (const auto& planes : arguments) segments.push_back(plane_views(planes, type));
        std::vector<Status> statuses(segments.size(), Status::ok);
        nb::gil_scoped_release release;
        parallel_for<Workspace>(segments.size(), threads, [&](std::size_t s, Workspace& workspace) {
            statuses[s] = lossless_.decode({payloads[s].data(), payloads[s].size()}, segments[s], type, workspace);
        });
        return static_cast<int>(worst_of(statuses));
    }

  private:
    static void check_lossy(Dtype dtype, int levels) {
        if (dtype > Dtype::float32 || levels < 1 || levels > 3)
            throw nb::value_error("lossy coding takes bfloat16, float16 or float32 and 1 to 3 levels");
    }
    static LossyTables lossy_tables(const U16Table& values, const U16Table& digits, const FloatTable& shrinkage,
                                    const DoubleArray& thresholds, const DoubleArray& variances) {
        if (values.shape(0) != LossyTables::kScales || values.shape(1) != 256 || digits.shape(0) != 3 * LossyTables::kScales ||
            digits.shape(1) != 3 || shrinkage.shape(0) != LossyTables::kScales || shrinkage.shape(1) != LossyTables::kShrinkage ||
            thresholds.size() != 63 || variances.size() != 64)
            throw nb::value_error("lossy tables have the wrong shapes");
        SlotTable slots = slot_table(values, true);
        NearSymbols near(slots, LossyTables::kValueMax, true);
        return {std::move(slots), slot_table(digits, false), std::move(near),
                {shrinkage.data(), shrinkage.data() + shrinkage.size()},
                {thresholds.data(), thresholds.data() + thresholds.size()},
                {variances.data(), variances.data() + variances.size()}};
    }
    static LosslessTables lossless_tables(const U16Table& exponents, const I32Table& costs) {
        if (exponents.shape(0) != LosslessTables::kTables || exponents.shape(1) != LosslessTables::kSymbols ||
            costs.size() != exponents.size())
            throw nb::value_error("lossless tables have the wrong shapes");
        SlotTable slots = slot_table(exponents, true);
        NearSymbols near(slots, 0, false);
        return {std::move(slots), std::move(near), {costs.data(), costs.data() + costs.size()}};
    }

    LossyCodec lossy_;
    LosslessCodec lossless_;
};

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "kvstore codec core (C++)";
    nb::set_leak_warnings(false);  // the coder is a module-level constant, alive when the interpreter ends
    m.def("view_bits", &view_bits, nb::arg("array").noconvert(),
          "(dtype name, the array's memory as unsigned integers of its element size, sharing it)");
    m.def("instruction_sets", &instruction_sets, "(number, name) of those that this build and this CPU have; the last is the best");
    nb::class_<Coder>(m, "Coder", "Codes segments; see kvstore_codec.segments.SegmentCoder")
        .def(nb::init<const U16Table&, const U16Table&, const FloatTable&, const DoubleArray&, const DoubleArray&,
                      const U16Table&, const I32Table&, int>(),
             nb::arg("values"), nb::arg("digits"), nb::arg("shrinkage"), nb::arg("thresholds"), nb::arg("variances"),
             nb::arg("exponents"), nb::arg("costs"), nb::arg("isa"), "isa: a number of `instruction_sets()`, else ValueError")
        .def("drain_tokens", &Coder::drain_tokens, nb::arg("groups"), nb::arg("sinks"), nb::arg("dtype"), nb::arg("threads"))
        .def("encode_lossy", &Coder::encode_lossy, nb::arg("segments"), nb::arg("sinks"), nb::arg("dtype"), nb::arg("levels"),
             nb::arg("threads"), "(status, for each segment the payload of each quality layer)")
        .def("decode_lossy", &Coder::decode_lossy, nb::arg("segments"), nb::arg("payloads"), nb::arg("sinks"),
             nb::arg("dtype"), nb::arg("threads"), "status; writes the planes")
        .def("encode_lossless", &Coder::encode_lossless, nb::arg("segments"), nb::arg("dtype"), nb::arg("threads"))
        .def("decode_lossless", &Coder::decode_lossless, nb::arg("segments"), nb::arg("payloads"), nb::arg("dtype"),
             nb::arg("threads"), "status; writes the planes");
    bind_raw(m);
}
