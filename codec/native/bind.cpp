// Python bindings: the only file that knows of Python. Checks types and shapes, releases the GIL, calls the core.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace nb = nanobind;

namespace {

// numpy's and ml_dtypes' name of a DLPack element type; "" for one that kvstore does not store.
std::string dtype_name(nb::dlpack::dtype type) {
    if (type.lanes != 1) return "";
    enum : std::uint8_t { Int = 0, UInt = 1, Float = 2, Bfloat = 4, Float8E4M3FN = 10, Float8E5M2 = 12 };
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

// The memory of any CPU array that speaks DLPack, as unsigned integers of its element size, not copied.
std::pair<std::string, nb::object> view_bits(nb::ndarray<nb::device::cpu> array) {
    const std::string name = dtype_name(array.dtype());
    if (name.empty()) return {"", nb::none()};
    const std::uint8_t bits = array.dtype().bits;
    if (bits != 8 && bits != 16 && bits != 32) return {"", nb::none()};
    std::vector<std::size_t> shape(array.ndim());
    std::vector<std::int64_t> strides(array.ndim());
    for (std::size_t axis = 0; axis < array.ndim(); ++axis) {
        shape[axis] = array.shape(axis);
        strides[axis] = array.stride(axis);
    }
    const nb::dlpack::dtype unsigned_type{static_cast<std::uint8_t>(nb::dlpack::dtype_code::UInt), bits, 1};
    nb::ndarray<nb::numpy> view(array.data(), array.ndim(), shape.data(), nb::find(array), strides.data(), unsigned_type);
    return {name, nb::cast(view)};
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "kvstore codec core (C++)";
    m.def("view_bits", &view_bits, nb::arg("array").noconvert(),
          "(dtype name, the array's memory as unsigned integers of its element size, sharing it)");
}
