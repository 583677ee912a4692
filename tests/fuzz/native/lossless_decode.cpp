// As lossy_decode.cpp, for exact segments.
#include "case.hpp"
#include "coders.hpp"

using namespace kvstore;
using namespace kvstore::fuzz;

extern "C" int LLVMFuzzerTestOneInput(const u8* data, std::size_t size) {
    const auto input = read_case({data, size}, 5);
    if (!input) return -1;
    const Bytes payload = input->payloads(1).front();
    std::optional<Outcome> expected;
    u8 background = 0x00;
    for (const Coders& coder : coders()) {
        Planes planes(*input, background);
        background += 0x55;
        const Status status = coder.lossless.decode(payload, planes.views(), input->dtype, workspace());
        const Outcome outcome = lossless_outcome(status, planes);
        if (!expected) expected = outcome;
        require(outcome == *expected, "instruction sets decode differently");
    }
    require(!must_decode() || expected->status == Status::ok, "what an encoder wrote does not decode");
    return 0;
}
