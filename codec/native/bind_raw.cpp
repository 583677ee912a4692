// Python bindings of raw_planes.hpp.
#include <optional>

#include "bind_planes.hpp"
#include "raw_planes.hpp"

namespace {

using Room = nb::ndarray<u8, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
// One array [layers, 2, tokens, heads, dim] of all planes, or each plane.
using PlanesArgument = std::variant<AnyArray, std::vector<PlaneArgument>>;

std::vector<PlaneView> views_of(const AnyArray& whole, std::size_t element) {
    if (whole.ndim() != 5 || whole.shape(1) != 2 || whole.itemsize() != element || whole.shape(2) < 1 || whole.shape(2) > 0xFFFF)
        throw nb::value_error("planes in one array are [layers, 2, tokens, heads, dim], of 1 to 65535 tokens");
    const auto stride = [&](std::size_t axis) {
        return static_cast<std::ptrdiff_t>(whole.stride(axis)) * static_cast<std::ptrdiff_t>(element);
    };
    std::vector<PlaneView> views(2 * whole.shape(0));
    for (std::size_t index = 0; index < views.size(); ++index) {
        const auto layer = static_cast<std::ptrdiff_t>(index / 2), side = static_cast<std::ptrdiff_t>(index % 2);
        PlaneView& view = views[index];
        view.data = static_cast<u8*>(const_cast<void*>(whole.data())) + layer * stride(0) + side * stride(1);
        view.tokens = whole.shape(2);
        view.heads = whole.shape(3);
        view.dim = whole.shape(4);
        view.token_stride = stride(2);
        view.head_stride = stride(3);
        view.dim_stride = stride(4);
    }
    return views;
}

std::vector<PlaneView> views_of(const std::vector<PlaneArgument>& planes, std::size_t element) {
    std::vector<PlaneView> views;
    for (const PlaneArgument& plane : planes) views.push_back(plane_view(plane, element));
    return views;
}

// Raw planes, and what keeps their memory alive.
class HeldPlanes {
  public:
    HeldPlanes(PlanesArgument arrays, std::size_t element, int isa)
        : arrays_(std::move(arrays)),
          planes_(std::visit([&](const auto& some) { return views_of(some, checked(element)); }, arrays_), element,
                  kernels_or_throw(isa)) {}

    std::pair<int, std::size_t> write(const Payload& table, const Payload& payload) const {
        nb::gil_scoped_release release;
        return pair_of(planes_.write(bytes_of(table), bytes_of(payload)));
    }

    nb::bytes seal(const Payload& head, std::size_t segments) const {
        const std::size_t size = head.size() + planes_.bytes();
        nb::bytes object = nb::steal<nb::bytes>(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(size)));
        if (!object.is_valid()) throw std::bad_alloc();
        seal_at({reinterpret_cast<u8*>(PyBytes_AS_STRING(object.ptr())), size}, head, segments);
        return object;
    }

    void seal_into(const Room& object, const Payload& head, std::size_t segments) const {
        if (object.size() != head.size() + planes_.bytes()) throw nb::value_error("the room has another size than the object");
        seal_at({object.data(), object.size()}, head, segments);
    }

  private:
    // Throws nb::value_error.
    void seal_at(std::span<u8> object, const Payload& head, std::size_t segments) const {
        if (head.size() != kHeaderBytes + segments * kEntryBytes) throw nb::value_error("head is a header and its table");
        bool fits;
        {
            nb::gil_scoped_release release;
            std::memcpy(object.data(), head.data(), head.size());
            fits = planes_.seal(object, segments);
        }
        if (!fits) throw nb::value_error("the table does not fit the planes");
    }

    static constexpr std::size_t kHeaderBytes = 192, kEntryBytes = 24;
    static std::size_t checked(std::size_t element) {
        if (element != 1 && element != 2 && element != 4) throw nb::value_error("elements have 1, 2 or 4 bytes");
        return element;
    }
    static ByteView bytes_of(const Payload& bytes) { return {bytes.data(), bytes.size()}; }
    static std::pair<int, std::size_t> pair_of(const RawOutcome& outcome) {
        return {static_cast<int>(outcome.status), outcome.segment};
    }

    PlanesArgument arrays_;
    RawPlanes planes_;
};

}  // namespace

void bind_raw(nb::module_& m) {
    nb::class_<HeldPlanes>(m, "RawPlanes", "K₀, V₀, K₁, V₁, … of a raw object; see kvstore_codec.raw")
        .def(nb::init<PlanesArgument, std::size_t, int>(), nb::arg("planes"), nb::arg("itemsize"), nb::arg("isa"),
             "planes: one array [layers, 2, tokens, heads, dim], or one each; isa: a number of `instruction_sets()`")
        .def("write", &HeldPlanes::write, nb::arg("table"), nb::arg("payload"),
             "(status, segment at fault); copies the payload, comparing each segment's checksum")
        .def("seal", &HeldPlanes::seal, nb::arg("head"), nb::arg("segments"),
             "the object that a header and a table without checksums head, with its payload and all checksums")
        .def("seal_into", &HeldPlanes::seal_into, nb::arg("object"), nb::arg("head"), nb::arg("segments"),
             "the same, into memory of just that size");
}
