// Python bindings of raw_planes.hpp and raw_chunks.hpp.
#include <limits>
#include <optional>

#include "bind_planes.hpp"
#include "raw_chunks.hpp"

namespace {

using Room = nb::ndarray<u8, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
// One array [layers, 2, tokens, heads, dim] of all planes, or each plane.
using PlanesArgument = std::variant<AnyArray, std::vector<PlaneArgument>>;

std::vector<PlaneView> views_of(const AnyArray& whole, std::size_t element, std::size_t tokens_max) {
    if (whole.ndim() != 5 || whole.shape(1) != 2 || whole.itemsize() != element || whole.shape(2) < 1 || whole.shape(2) > tokens_max)
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

std::vector<PlaneView> views_of(const std::vector<PlaneArgument>& planes, std::size_t element, std::size_t tokens_max) {
    std::vector<PlaneView> views;
    for (const PlaneArgument& plane : planes) views.push_back(plane_view(plane, element, tokens_max));
    return views;
}

std::size_t checked(std::size_t element) {
    if (element != 1 && element != 2 && element != 4) throw nb::value_error("elements have 1, 2 or 4 bytes");
    return element;
}

RawPlanes planes_of(const PlanesArgument& arrays, std::size_t element, std::size_t tokens_max, const Kernels& kernels) {
    return {std::visit([&](const auto& some) { return views_of(some, checked(element), tokens_max); }, arrays), element, kernels};
}

ByteView bytes_of(const Payload& bytes) { return {bytes.data(), bytes.size()}; }

// Raw planes, and what keeps their memory alive.
class HeldPlanes {
  public:
    HeldPlanes(PlanesArgument arrays, std::size_t element, int isa)
        : arrays_(std::move(arrays)), planes_(planes_of(arrays_, element, kObjectTokensMax, kernels_or_throw(isa))) {}

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
    static std::pair<int, std::size_t> pair_of(const RawOutcome& outcome) {
        return {static_cast<int>(outcome.status), outcome.segment};
    }

    PlanesArgument arrays_;
    RawPlanes planes_;
};

// (head, hash, position, first token in the planes, tokens)
using ChunkArgument = std::tuple<nb::bytes, nb::bytes, u64, std::size_t, std::size_t>;

// Planes of all of a prompt's tokens, and what keeps their memory alive.
class HeldChunks {
  public:
    HeldChunks(PlanesArgument arrays, std::size_t element, int provenance_max, int isa)
        : arrays_(std::move(arrays)), kernels_(kernels_or_throw(isa)),
          planes_(planes_of(arrays_, element, std::numeric_limits<std::size_t>::max(), kernels_)),
          provenance_max_(static_cast<u8>(provenance_max)) {
        if (provenance_max < 0 || provenance_max > 0xFF) throw nb::value_error("a provenance is a byte");
    }

    std::size_t read(const std::vector<std::pair<Payload, ChunkArgument>>& objects) const {
        std::vector<RawChunk> chunks;
        for (const auto& [_, chunk] : objects) chunks.push_back(checked_chunk(chunk));
        nb::gil_scoped_release release;
        std::size_t done = 0;
        for (; done < objects.size(); ++done) {
            const ByteView object = bytes_of(objects[done].first);
            RawChunkReader reader(planes_, kernels_, chunks[done]);
            if (reader.take(object) != object.size() || reader.state() != RawChunkReader::State::done) break;
        }
        return done;
    }

    RawChunkReader reader(const ChunkArgument& chunk) const { return {planes_, kernels_, checked_chunk(chunk)}; }

  private:
    // Throws nb::value_error.
    RawChunk checked_chunk(const ChunkArgument& argument) const {
        const auto& [head, hash, position, first, tokens] = argument;
        const auto bytes = [](const nb::bytes& some) { return static_cast<const u8*>(some.data()); };
        const RawChunk chunk{{bytes(head), head.size()}, bytes(hash), position, {first, tokens}, provenance_max_};
        if (hash.size() != 32 || !RawChunkReader::fits(planes_, chunk)) throw nb::value_error("a chunk does not fit the planes");
        return chunk;
    }

    PlanesArgument arrays_;
    const Kernels& kernels_;
    RawPlanes planes_;
    u8 provenance_max_;
};

// One chunk's reader, and what keeps alive what it points at.
class HeldReader {
  public:
    HeldReader(nb::object chunks, ChunkArgument chunk)
        : chunks_(std::move(chunks)), chunk_(std::move(chunk)), reader_(nb::cast<const HeldChunks&>(chunks_).reader(chunk_)) {}

    std::size_t take(const Payload& bytes) {
        nb::gil_scoped_release release;
        return reader_.take(bytes_of(bytes));
    }
    int state() const { return static_cast<int>(reader_.state()); }
    std::size_t segment() const { return reader_.segment(); }

  private:
    nb::object chunks_;
    ChunkArgument chunk_;
    RawChunkReader reader_;
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
    nb::class_<HeldChunks>(m, "RawChunks", "planes of the tokens of many chunks; see kvstore_codec.raw_chunks")
        .def(nb::init<PlanesArgument, std::size_t, int, int>(), nb::arg("planes"), nb::arg("itemsize"),
             nb::arg("provenance_max"), nb::arg("isa"), "planes, itemsize, isa: as of RawPlanes, of any number of tokens")
        .def("read", &HeldChunks::read, nb::arg("objects"),
             "(object, chunk) of each; how many of the first are in their places. A chunk is (head, hash, position, first "
             "token in the planes, tokens)");
    nb::class_<HeldReader>(m, "RawChunkReader", "one object of RawChunks, in pieces")
        .def(nb::init<nb::object, ChunkArgument>(), nb::arg("chunks"), nb::arg("chunk"))
        .def("take", &HeldReader::take, nb::arg("data"), "how many of the object's next bytes are done with")
        .def_prop_ro("state", &HeldReader::state, "0 reading, 1 done, 2 another object, 3 damaged")
        .def_prop_ro("segment", &HeldReader::segment, "the one at fault");
}
