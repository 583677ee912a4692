// Any bits as KV: the same payload from every instruction set, which decodes to those bits. Then the payload damaged.
#include "case.hpp"
#include "coders.hpp"

using namespace kvstore;
using namespace kvstore::fuzz;

extern "C" int LLVMFuzzerTestOneInput(const u8* data, std::size_t size) {
    const auto input = read_case({data, size}, 5);
    if (!input) return -1;
    const Bytes values = input->values();
    std::optional<Bytes> payload;
    std::optional<Outcome> expected;
    u8 background = 0x00;
    for (const Coders& coder : coders()) {
        Planes planes(*input, 0x11), before(*input, 0x11);
        planes.write(values);
        before.write(values);
        const Bytes coded = coder.lossless.encode(planes.views(), input->dtype, workspace());
        require(planes.same_memory(before), "an encoder wrote into the caller's array");
        if (!payload) payload = coded;
        require(coded == *payload, "instruction sets encode differently");

        Planes restored(*input, background);
        require(coder.lossless.decode(coded, restored.views(), input->dtype, workspace()) == Status::ok,
                "what an encoder wrote does not decode");
        restored.require_gaps_kept();
        require(restored.read() == values, "a lossless round trip changed a bit");

        Bytes bad = coded;
        if (input->rest.size() >= 3 && !bad.empty())
            bad[load<u16>(input->rest.data()) % bad.size()] ^= input->rest[2];
        Planes odd(*input, background);
        background += 0x55;
        const Outcome outcome = lossless_outcome(coder.lossless.decode(bad, odd.views(), input->dtype, workspace()), odd);
        if (!expected) expected = outcome;
        require(outcome == *expected, "instruction sets decode differently");
    }
    return 0;
}
