#include "simt/count.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <set>
#include <tuple>

namespace simt {
namespace {

std::mutex mutex;
std::map<std::string, Count> total;

using Notes = std::vector<const Counts::Note*>;

Count global_cost(const Notes& lanes) {
  std::set<uintptr_t> sectors, words;
  for (const auto* n : lanes) {
    const auto first = reinterpret_cast<uintptr_t>(n->address);
    for (uintptr_t a = first / 32; a <= (first + n->size - 1) / 32; ++a) sectors.insert(a);
    for (uintptr_t a = first; a < first + n->size; ++a) words.insert(a);
  }
  return {1, static_cast<int64_t>(sectors.size()), static_cast<int64_t>((words.size() + 31) / 32)};
}

Count shared_cost(const Notes& lanes) {
  uint32_t widest = 4;
  for (const auto* n : lanes) widest = std::max(widest, n->size);
  const size_t at_once = 32 / (widest / 4);  // lanes per pass
  Count count{1, 0, 0};
  for (size_t first = 0; first < lanes.size(); first += at_once) {
    std::set<uintptr_t> words[32];  // per bank; several lanes that read one word count once
    for (size_t i = first; i < std::min(first + at_once, lanes.size()); ++i) {
      const auto a = reinterpret_cast<uintptr_t>(lanes[i]->address);
      for (uintptr_t w = a / 4; w <= (a + lanes[i]->size - 1) / 4; ++w) words[w % 32].insert(w);
    }
    size_t passes = 1;
    for (const auto& bank : words) passes = std::max(passes, bank.size());
    count.transactions += passes;
    ++count.min_transactions;
  }
  return count;
}

}  // namespace

void Counts::begin(int threads) {
  notes.resize(std::max<size_t>(notes.size(), threads));
  for (auto& n : notes) n.clear();
}

void Counts::note(const void* address, size_t size, Access access, bool shared, const Site& site) {
  notes[self->number].push_back({address, static_cast<uint32_t>(size), access, shared, site});
}

void Counts::end(const char* kernel, const Block& block) {
  if (!options().count) return;
  static const char* verbs[] = {"read", "write", "atomic"};
  const std::lock_guard lock(mutex);
  for (size_t w = 0; w < block.warps.size(); ++w) {
    // site in the source, kind -> k-th access there -> lanes
    std::map<std::tuple<std::string, unsigned, unsigned, int, bool>, std::vector<Notes>> sites;
    for (size_t t = 32 * w; t < std::min<size_t>(32 * w + 32, notes.size()); ++t) {
      std::map<std::tuple<const char*, unsigned, unsigned, int, bool>, size_t> counted;
      for (const Note& n : notes[t]) {
        const int access = static_cast<int>(n.access);
        const auto key =
            std::tuple(n.site.file_name(), n.site.line(), n.site.column(), access, n.shared);
        auto& instructions =
            sites[{n.site.file_name(), n.site.line(), n.site.column(), access, n.shared}];
        const size_t k = counted[key]++;
        if (instructions.size() <= k) instructions.resize(k + 1);
        instructions[k].push_back(&n);
      }
    }
    for (const auto& [location, instructions] : sites) {
      const auto& [file, line, column, access, shared] = location;
      const size_t slash = file.rfind('/');
      const std::string name =
          std::string(kernel) + " " + file.substr(slash == std::string::npos ? 0 : slash + 1) +
          ":" + std::to_string(line) + " " + verbs[access] + (shared ? " shared" : " global");
      Count& sum = total[name];
      for (const Notes& lanes : instructions) {
        const Count c = shared ? shared_cost(lanes) : global_cost(lanes);
        sum.instructions += c.instructions;
        sum.transactions += c.transactions;
        sum.min_transactions += c.min_transactions;
      }
    }
  }
}

std::map<std::string, Count> report() {
  const std::lock_guard lock(mutex);
  return total;
}

void reset_report() {
  const std::lock_guard lock(mutex);
  total.clear();
}

}  // namespace simt
