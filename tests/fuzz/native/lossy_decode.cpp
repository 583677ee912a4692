// Payloads of anybody's making: every instruction set refuses them for the same reason, or writes the same bits, all of
// them, and nothing else.
#include "case.hpp"
#include "coders.hpp"

using namespace kvstore;
using namespace kvstore::fuzz;

extern "C" int LLVMFuzzerTestOneInput(const u8* data, std::size_t size) {
    const auto input = read_case({data, size}, 3);
    if (!input) return -1;
    const std::vector<Bytes> payloads = input->payloads(input->levels);
    const std::vector<ByteView> views(payloads.begin(), payloads.end());
    std::optional<Outcome> expected;
    u8 background = 0x00;
    for (const Coders& coder : coders()) {
        Planes planes(*input, background);
        background += 0x55;
        Segment segment(*input, planes);
        const Status status = coder.lossy.decode(*segment, views, input->sinks, input->dtype, workspace());
        const Outcome outcome = lossy_outcome(status, planes, *input);
        if (!expected) expected = outcome;
        require(outcome == *expected, "instruction sets decode differently");
    }
    require(!must_decode() || expected->status == Status::ok, "what an encoder wrote does not decode");
    return 0;
}
