#include "coders.hpp"

#include "case.hpp"

namespace kvstore::fuzz {
namespace {

#include "tables.inc"  // kValues, kDigits, kShrinkage, kThresholds, kVariances, kExponents, kCosts

SlotTable slot_table(std::span<const u16> frequencies, std::size_t symbols, bool with_slots) {
    SlotTable table;
    require(table.build(frequencies, symbols, with_slots), "tables.bin is damaged");
    return table;
}

std::vector<Coders> make_coders() {
    std::vector<Coders> found;
    for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512}) {
        const Kernels* kernels = kernels_for(isa);
        const auto gemm = static_cast<gemm::Isa>(isa);
        if (kernels == nullptr || !gemm::supported(gemm)) continue;
        const SlotTable values = slot_table(kValues, 256, true);
        const SlotTable exponents = slot_table(kExponents, LosslessTables::kSymbols, true);
        LossyTables lossy{values, slot_table(kDigits, 3, false), NearSymbols(values, LossyTables::kValueMax, true),
                          {std::begin(kShrinkage), std::end(kShrinkage)},
                          {std::begin(kThresholds), std::end(kThresholds)},
                          {std::begin(kVariances), std::end(kVariances)}};
        LosslessTables lossless{exponents, NearSymbols(exponents, 0, false), {std::begin(kCosts), std::end(kCosts)}};
        found.push_back({LossyCodec(std::move(lossy), *kernels, gemm), LosslessCodec(std::move(lossless), *kernels)});
    }
    return found;
}

}  // namespace

const std::vector<Coders>& coders() {
    static const std::vector<Coders> all = make_coders();
    return all;
}

Workspace& workspace() {
    static Workspace kept;
    return kept;
}

}  // namespace kvstore::fuzz
