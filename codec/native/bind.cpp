// Python bindings: the only file that knows of Python. Checks types and shapes, releases the GIL, calls the core.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "avx512.hpp"
#include "lossless.hpp"
#include "lossy.hpp"

namespace nb = nanobind;
using namespace kvstore;

namespace {

// Read-only, since encoders take what they are given; decoders are handed writable memory by arrays.planes_to_write.
using AnyArray = nb::ndarray<nb::ro, nb::device::cpu>;
using FloatTable = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using U16Array = nb::ndarray<const u16, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using U16Table = nb::ndarray<const u16, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using I32Table = nb::ndarray<const i32, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using DoubleArray = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rotations = std::optional<std::tuple<FloatTable, FloatTable, bool>>;
using Payload = nb::ndarray<const u8, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
// (bits [tokens, heads, dim], rotation, step factor)
using PlaneArgument = std::tuple<AnyArray, Rotations, double>;

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

PlaneView plane_view(const AnyArray& array, std::size_t tokens, Dtype dtype) {
    const bool fits = array.ndim() == 3 && array.shape(0) == tokens && array.itemsize() == element_bytes(dtype) &&
                      (tokens == 0 || array.shape(1) * array.shape(2) == 0 ||
                       ((array.shape(2) == 1 || array.stride(2) == 1) &&
                        (array.shape(1) == 1 || array.stride(1) == static_cast<i64>(array.shape(2)))));
    if (!fits) throw nb::value_error("a plane must be [tokens, heads, dim] with contiguous rows");
    return {static_cast<u8*>(const_cast<void*>(array.data())), tokens, array.shape(1), array.shape(2),
            static_cast<std::ptrdiff_t>(array.stride(0)) * static_cast<std::ptrdiff_t>(array.itemsize())};
}

std::size_t common_tokens(const AnyArray& first, std::size_t sinks) {
    if (first.ndim() != 3 || first.shape(0) == 0 || first.shape(0) > 0xFFFF || sinks > first.shape(0))
        throw nb::value_error("a plane must be [tokens, heads, dim] with 1 to 65535 tokens, sinks among them");
    return first.shape(0);
}

std::vector<CodedPlane> coded_planes(const std::vector<PlaneArgument>& arguments, std::size_t sinks, Dtype dtype) {
    if (arguments.empty()) throw nb::value_error("a segment has at least one plane");
    const std::size_t tokens = common_tokens(std::get<0>(arguments.front()), sinks);
    std::vector<CodedPlane> planes;
    for (const auto& [array, rotation, step_factor] : arguments) {
        CodedPlane coded{plane_view(array, tokens, dtype), {}, step_factor};
        if (rotation) {
            const auto& [cos, sin, interleaved] = *rotation;
            if (cos.shape(0) != tokens || sin.shape(0) != tokens || cos.shape(1) != sin.shape(1) ||
                2 * cos.shape(1) > coded.plane.dim)
                throw nb::value_error("rotation tables must be [tokens, pairs] with 2 * pairs <= dim");
            coded.rotation = {cos.data(), sin.data(), cos.shape(1), interleaved};
        }
        planes.push_back(coded);
    }
    return planes;
}

std::vector<PlaneView> plane_views(const std::vector<AnyArray>& arrays, Dtype dtype) {
    if (arrays.empty()) throw nb::value_error("a segment has at least one plane");
    const std::size_t tokens = common_tokens(arrays.front(), 0);
    std::vector<PlaneView> planes;
    for (const AnyArray& array : arrays) planes.push_back(plane_view(array, tokens, dtype));
    return planes;
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
    Coder(const U16Table& values, const U16Table& digits, const FloatTable& centroids, const DoubleArray& thresholds,
          const DoubleArray& variances, const U16Table& exponents, const I32Table& costs, bool vector)
        : lossy_(lossy_tables(values, digits, centroids, thresholds, variances), vector),
          lossless_(lossless_tables(exponents, costs)) {
        if (vector && !avx512::supported()) throw nb::value_error("this CPU has no AVX-512");
    }

    nb::ndarray<nb::numpy, u16, nb::ndim<1>> drain_tokens(const AnyArray& k, const AnyArray& v, std::size_t sinks, int dtype) const {
        const Dtype type = static_cast<Dtype>(dtype);
        const std::size_t tokens = common_tokens(k, sinks);
        const PlaneView k_plane = plane_view(k, tokens, type), v_plane = plane_view(v, tokens, type);
        auto* found = new std::vector<u16>;
        nb::capsule owner(found, [](void* p) noexcept { delete static_cast<std::vector<u16>*>(p); });
        {
            nb::gil_scoped_release release;
            *found = kvstore::drain_tokens(k_plane, v_plane, sinks, type);
        }
        return {found->data(), {found->size()}, owner};
    }

    std::pair<int, std::vector<nb::bytes>> encode_lossy(const std::vector<PlaneArgument>& arguments,
                                                        const U16Array& drains, std::size_t sinks, int dtype,
                                                        int levels) const {
        const Dtype type = static_cast<Dtype>(dtype);
        const std::vector<CodedPlane> planes = coded_planes(arguments, sinks, type);
        const std::span<const u16> drain_list{drains.data(), drains.size()};
        check_lossy(type, levels);
        check_drains(drain_list, sinks, planes.front().plane.tokens);
        std::vector<Bytes> payloads;
        Status status;
        {
            nb::gil_scoped_release release;
            status = lossy_.encode(planes, drain_list, sinks, type, levels, payloads);
        }
        std::vector<nb::bytes> out;
        if (status == Status::ok)
            for (const Bytes& payload : payloads) out.push_back(to_bytes(payload));
        return {static_cast<int>(status), std::move(out)};
    }

    int decode_lossy(const std::vector<Payload>& payloads, const std::vector<PlaneArgument>& arguments,
                     std::size_t sinks, int dtype) const {
        const Dtype type = static_cast<Dtype>(dtype);
        const std::vector<CodedPlane> planes = coded_planes(arguments, sinks, type);
        check_lossy(type, static_cast<int>(payloads.size()));
        std::vector<ByteView> views;
        for (const Payload& payload : payloads) views.emplace_back(payload.data(), payload.size());
        nb::gil_scoped_release release;
        return static_cast<int>(lossy_.decode(views, planes, sinks, type));
    }

    nb::bytes encode_lossless(const std::vector<AnyArray>& arrays, int dtype) const {
        const std::vector<PlaneView> planes = plane_views(arrays, static_cast<Dtype>(dtype));
        Bytes payload;
        {
            nb::gil_scoped_release release;
            payload = lossless_.encode(planes, static_cast<Dtype>(dtype));
        }
        return to_bytes(payload);
    }

    int decode_lossless(const Payload& payload, const std::vector<AnyArray>& arrays, int dtype) const {
        const std::vector<PlaneView> planes = plane_views(arrays, static_cast<Dtype>(dtype));
        nb::gil_scoped_release release;
        return static_cast<int>(lossless_.decode({payload.data(), payload.size()}, planes, static_cast<Dtype>(dtype)));
    }

  private:
    static void check_lossy(Dtype dtype, int levels) {
        if (dtype > Dtype::float32 || levels < 1 || levels > 3)
            throw nb::value_error("lossy coding takes bfloat16, float16 or float32 and 1 to 3 levels");
    }
    static void check_drains(std::span<const u16> drains, std::size_t sinks, std::size_t tokens) {
        for (std::size_t i = 0; i < drains.size(); ++i)
            if (drains[i] < sinks || drains[i] >= tokens || (i > 0 && drains[i] <= drains[i - 1]))
                throw nb::value_error("drain tokens must ascend, after the sinks");
    }
    static LossyTables lossy_tables(const U16Table& values, const U16Table& digits, const FloatTable& centroids,
                                    const DoubleArray& thresholds, const DoubleArray& variances) {
        if (values.shape(0) != LossyTables::kScales || values.shape(1) != 256 || digits.shape(0) != 3 * LossyTables::kScales ||
            digits.shape(1) != 3 || centroids.shape(0) != LossyTables::kScales || centroids.shape(1) != LossyTables::kCentroids ||
            thresholds.size() != 63 || variances.size() != 64)
            throw nb::value_error("lossy tables have the wrong shapes");
        return {slot_table(values, true), slot_table(digits, false),
                {centroids.data(), centroids.data() + centroids.size()},
                {thresholds.data(), thresholds.data() + thresholds.size()},
                {variances.data(), variances.data() + variances.size()}};
    }
    static LosslessTables lossless_tables(const U16Table& exponents, const I32Table& costs) {
        if (exponents.shape(0) != LosslessTables::kTables || exponents.shape(1) != LosslessTables::kSymbols ||
            costs.size() != exponents.size())
            throw nb::value_error("lossless tables have the wrong shapes");
        return {slot_table(exponents, true), {costs.data(), costs.data() + costs.size()}};
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
    m.def("has_avx512", &avx512::supported, "whether this build and this CPU have it");
    nb::class_<Coder>(m, "Coder", "Codes segments; see kvstore_codec.segments.SegmentCoder")
        .def(nb::init<const U16Table&, const U16Table&, const FloatTable&, const DoubleArray&, const DoubleArray&,
                      const U16Table&, const I32Table&, bool>(),
             nb::arg("values"), nb::arg("digits"), nb::arg("centroids"), nb::arg("thresholds"), nb::arg("variances"),
             nb::arg("exponents"), nb::arg("costs"), nb::arg("vector"),
             "vector: use AVX-512; ValueError where `has_avx512()` is false")
        .def("drain_tokens", &Coder::drain_tokens, nb::arg("k").noconvert(), nb::arg("v").noconvert(), nb::arg("sinks"),
             nb::arg("dtype"))
        .def("encode_lossy", &Coder::encode_lossy, nb::arg("planes"), nb::arg("drains"), nb::arg("sinks"),
             nb::arg("dtype"), nb::arg("levels"), "(status, payload of each quality layer)")
        .def("decode_lossy", &Coder::decode_lossy, nb::arg("payloads"), nb::arg("planes"), nb::arg("sinks"),
             nb::arg("dtype"), "status; writes the planes")
        .def("encode_lossless", &Coder::encode_lossless, nb::arg("planes"), nb::arg("dtype"))
        .def("decode_lossless", &Coder::decode_lossless, nb::arg("payload"), nb::arg("planes"), nb::arg("dtype"),
             "status; writes the planes");
}
