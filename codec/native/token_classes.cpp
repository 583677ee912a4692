#include "token_classes.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace kvstore {
namespace {

constexpr double kDrainKNorm = 0.5, kDrainVNorm = 0.25;  // of the layer's median norm
constexpr std::size_t kDrainTokensDivisor = 2;  // more drain tokens than one in so many are none

}  // namespace

TokenClasses classify(std::size_t tokens, std::size_t sinks, std::span<const u16> drains) {
    TokenClasses classes;
    classes[kDrains].assign(drains.begin(), drains.end());
    auto next = drains.begin();
    for (std::size_t token = sinks; token < tokens; ++token) {
        if (next != drains.end() && *next == token) ++next;
        else classes[kPlain].push_back(static_cast<u32>(token));
    }
    return classes;
}

std::vector<u16> quiet_tokens(std::span<const std::vector<double>> energies, std::size_t tokens, std::size_t sinks) {
    std::vector<char> drain(tokens, 0), found(tokens, 0);
    std::vector<double> sorted;
    for (std::size_t plane = 0; plane < energies.size(); ++plane) {
        const std::vector<double>& energy = energies[plane];
        const double limit = plane % 2 ? kDrainVNorm : kDrainKNorm;
        if (plane % 2 == 0) std::fill(found.begin(), found.end(), 0);
        if (!energy.empty()) {
            sorted = energy;  // what is not finite is refused later, but must not disturb the order
            for (double& value : sorted) value = std::isfinite(value) ? value : std::numeric_limits<double>::infinity();
            const auto middle = sorted.begin() + static_cast<std::ptrdiff_t>((sorted.size() - 1) / 2);
            std::nth_element(sorted.begin(), middle, sorted.end());
            const double threshold = *middle * (limit * limit);
            for (std::size_t i = 0; i < energy.size(); ++i) found[sinks + i] |= energy[i] < threshold;
        }
        if (plane % 2 == 0 || std::find(found.begin() + static_cast<std::ptrdiff_t>(sinks), found.end(), 0) == found.end())
            continue;  // a layer all of whose tokens are quiet has none
        for (std::size_t token = 0; token < tokens; ++token) drain[token] |= found[token];
    }
    std::vector<u16> quiet;
    for (std::size_t token = 0; token < tokens; ++token)
        if (drain[token]) quiet.push_back(static_cast<u16>(token));
    if (quiet.size() * kDrainTokensDivisor > tokens - sinks) quiet.clear();
    return quiet;
}

}  // namespace kvstore
