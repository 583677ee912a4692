#include "near_symbols.hpp"

namespace kvstore {
namespace {

// Slots a lane may leave to the lookup in memory: with 32 lanes one step in thirteen then needs it.
constexpr u32 kSlotsLeftMax = 10;

}  // namespace

NearSymbols::NearSymbols(const SlotTable& table, std::size_t centre, bool mirrored)
    : rows_(table.freq.size() / table.symbols), reaches_(rows_.size(), 0) {
    for (std::size_t index = 0; index < rows_.size(); ++index) {
        const u16* const freq = table.freq.data() + index * table.symbols;
        NearRow& row = rows_[index];
        row.start = table.start[index * table.symbols + centre];
        row.width = freq[centre];
        row.codes[0] = static_cast<u16>(row.width - 1);
        u32 covered = row.width;
        for (std::size_t k = 1; k < NearRow::kEdges; ++k) {
            const u16 frequency = freq[centre + k];
            row.edges[k] = static_cast<u16>(row.edges[k - 1] + frequency);
            row.codes[k] = static_cast<u16>(k << kSlotBits | ((frequency - 1u) & (kSlots - 1)));
            covered += mirrored ? 2u * frequency : frequency;
            if (reaches_[index] == 0 && kSlots - covered <= kSlotsLeftMax) reaches_[index] = static_cast<int>(k + k % 2);
        }
    }
}

}  // namespace kvstore
