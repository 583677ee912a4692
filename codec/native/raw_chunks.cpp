#include "raw_chunks.hpp"

#include <algorithm>

namespace kvstore {

namespace {

constexpr std::size_t kHeader = 192, kEntry = 24, kEntryChecksum = 16;
constexpr std::size_t kHash = 40, kHashBytes = 32, kPosition = 80, kProvenance = 92, kObjectBytes = 136;
constexpr std::size_t kTableChecksum = 168, kHeaderChecksum = 184;

}  // namespace

bool RawChunkReader::fits(const RawPlanes& planes, const RawChunk& chunk) {
    const ByteView head = chunk.head;
    const std::size_t tokens = planes.tokens();
    return head.size() > kHeader && (head.size() - kHeader) % kEntry == 0 && chunk.window.tokens > 0 &&
           chunk.window.tokens <= tokens && chunk.window.first <= tokens - chunk.window.tokens &&
           load<u64>(head.data() + kObjectBytes) == head.size() + planes.bytes(chunk.window);
}

bool RawChunkReader::is_the_chunks() const {
    const u8 *const found = head_.data(), *const expected = chunk_.head.data();
    const auto same = [&](std::size_t first, std::size_t last) {
        return std::equal(found + first, found + last, expected + first);
    };
    const ByteView table = ByteView(head_).subspan(kHeader);
    bool ok = same(0, kHash) && std::equal(chunk_.hash, chunk_.hash + kHashBytes, found + kHash) &&
              same(kHash + kHashBytes, kPosition) && load<u64>(found + kPosition) == chunk_.position &&
              same(kPosition + 8, kProvenance) && found[kProvenance] <= chunk_.provenance_max &&
              same(kProvenance + 1, kTableChecksum) && load<u64>(found + kTableChecksum) == xxh3(kernels_, table) &&
              same(kTableChecksum + 8, kHeaderChecksum) &&
              load<u64>(found + kHeaderChecksum) == xxh3(kernels_, ByteView(head_).first(kHeaderChecksum));
    for (std::size_t entry = kHeader; ok && entry < head_.size(); entry += kEntry) ok = same(entry, entry + kEntryChecksum);
    return ok;
}

std::size_t RawChunkReader::take(ByteView bytes) {
    std::size_t taken = 0;
    if (state_ != State::reading) return 0;
    if (!writer_) {
        taken = chunk_.head.size();
        if (bytes.size() < taken) return 0;
        head_.assign(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(taken));
        if (!is_the_chunks()) {
            state_ = State::other;
            return 0;
        }
        writer_.emplace(planes_, ByteView(head_).subspan(kHeader), planes_.bytes(chunk_.window), chunk_.window);
    }
    taken += writer_->take(bytes.subspan(taken));
    if (writer_->ended()) state_ = writer_->outcome().status == Status::ok ? State::done : State::damaged;
    return taken;
}

}  // namespace kvstore
