// Which of a segment's tokens are sinks, drains and plain ones (FORMAT.md §4.1, §4.5).
//
// READ ME FIRST
//  * Lists of drain tokens from bytes are checked before they come here: ascending, behind the sinks, below `tokens`.
#pragma once

#include "core.hpp"

namespace kvstore {

// Tokens by class, in coding order: drain tokens, then plain ones. Sinks are in neither.
using TokenClasses = std::array<std::vector<u32>, 2>;
inline constexpr std::size_t kDrains = 0, kPlain = 1;

TokenClasses classify(std::size_t tokens, std::size_t sinks, std::span<const u16> drains);

// The drain tokens. `energies`: squared norms of the tokens from `sinks` on, of K and V in turn, layer by layer.
std::vector<u16> quiet_tokens(std::span<const std::vector<double>> energies, std::size_t tokens, std::size_t sinks);

}  // namespace kvstore
