// The codecs of every instruction set that runs here, scalar first.
#pragma once

#include "lossless.hpp"
#include "lossy.hpp"

namespace kvstore::fuzz {

struct Coders {
    LossyCodec lossy;
    LosslessCodec lossless;
};

const std::vector<Coders>& coders();

// One for all inputs and instruction sets: what a segment leaves there must not matter to the next.
Workspace& workspace();

}  // namespace kvstore::fuzz
