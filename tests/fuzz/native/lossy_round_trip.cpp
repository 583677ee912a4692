// Any bits as KV: refused as not finite, or the same payloads from every instruction set, which decode at every level,
// sinks exactly. Then the payloads damaged, which all instruction sets must read alike.
#include "case.hpp"
#include "coders.hpp"

using namespace kvstore;
using namespace kvstore::fuzz;

namespace {

// One byte of each payload becomes another, chosen by the input's last bytes.
std::vector<Bytes> damaged(std::vector<Bytes> payloads, ByteView choice) {
    for (Bytes& payload : payloads) {
        if (choice.size() < 3 || payload.empty()) break;
        payload[load<u16>(choice.data()) % payload.size()] ^= choice[2];
        choice = choice.subspan(3);
    }
    return payloads;
}

Outcome decode(const Coders& coder, const Case& input, const std::vector<Bytes>& payloads, u8 background) {
    const std::vector<ByteView> views(payloads.begin(), payloads.end());
    Planes planes(input, background);
    Segment segment(input, planes);
    const Status status = coder.lossy.decode(*segment, views, input.sinks, input.dtype, workspace());
    return lossy_outcome(status, planes, input);
}

Bytes sinks_of(const Case& input, const Bytes& values) {
    Bytes out;
    const u8* at = values.data();
    for (const auto& [heads, dim] : input.shapes) {
        const std::size_t row = heads * dim * element_bytes(input.dtype);
        out.insert(out.end(), at, at + input.sinks * row);
        at += input.tokens * row;
    }
    return out;
}

// What an encoder that finds its drain tokens finds.
std::vector<u16> found_drains(const Coders& coder, const Case& input, const Planes& planes) {
    std::vector<DrainLayer> layers;
    for (std::size_t p = 0; p < planes.views().size(); p += 2) layers.push_back({planes.views()[p], planes.views()[p + 1]});
    return coder.lossy.drain_tokens(layers, input.sinks, input.dtype);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const u8* data, std::size_t size) {
    const auto input = read_case({data, size}, 3);
    if (!input) return -1;
    const Bytes values = input->values();
    const std::vector<u16> drains = input->drain_tokens();
    std::optional<Status> status;
    std::vector<Bytes> payloads;
    for (const Coders& coder : coders()) {
        Planes planes(*input, 0x11), before(*input, 0x11);
        planes.write(values);
        before.write(values);
        Segment segment(*input, planes);
        (*segment).drains = drains;
        (*segment).find_drains = input->drains % 3 == 1 && input->shapes.size() % 2 == 0;
        std::vector<Bytes> coded;
        const Status found = coder.lossy.encode(*segment, input->sinks, input->dtype, input->levels, workspace(), coded);
        require(planes.same_memory(before), "an encoder wrote into the caller's array");
        if ((*segment).find_drains) {
            const std::vector<u16> listed = found_drains(coder, *input, planes);
            (*segment).find_drains = false;
            (*segment).drains = listed;
            std::vector<Bytes> again;
            require(coder.lossy.encode(*segment, input->sinks, input->dtype, input->levels, workspace(), again) == found &&
                        (found != Status::ok || again == coded),
                    "drain tokens differ when they are found first");
        }
        if (!status) status = found, payloads = coded;
        require(found == *status && (found != Status::ok || coded == payloads), "instruction sets encode differently");
    }
    require(*status == Status::ok || (*status == Status::not_finite && input->fill == 0), "finite values are refused");
    if (*status != Status::ok) return 0;
    const std::vector<Bytes> wrong = damaged(payloads, input->rest.last(std::min<std::size_t>(9, input->rest.size())));
    for (int levels = 1; levels <= input->levels; ++levels) {
        const std::vector<Bytes> held(payloads.begin(), payloads.begin() + levels), bad(wrong.begin(), wrong.begin() + levels);
        std::optional<Outcome> right, odd;
        u8 background = 0x00;
        for (const Coders& coder : coders()) {
            const Outcome one = decode(coder, *input, held, background), other = decode(coder, *input, bad, background);
            background += 0x55;
            if (!right) right = one, odd = other;
            require(one == *right && other == *odd, "instruction sets decode differently");
        }
        require(right->status == Status::ok, "what an encoder wrote does not decode");
        require(sinks_of(*input, right->values) == sinks_of(*input, values), "sinks are not exact");
    }
    return 0;
}
