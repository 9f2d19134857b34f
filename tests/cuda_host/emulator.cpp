// Runs blocks one after the other, and the threads of a block as fibres.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "cuda_runtime.h"

namespace checked {

void fail(const std::string& what) { throw std::runtime_error(what); }

constexpr size_t kSharedBytes = 48 * 1024;
alignas(128) static char shared[kSharedBytes];

void* shared_memory_of(size_t size) {
  if (size > kSharedBytes) fail("more than 48 KiB of shared memory");
  return shared;
}

}  // namespace checked

namespace emulator {

// Whether the last warp of a block and the last lane of a warp run first. What lanes do between meetings must not depend on
// it.
bool last_lane_first = false;
// How far the device's grids go in their second and third dimension. Kernels that loop over them do with any number.
unsigned max_grid = 65535;

namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned kWarpSize = 32;

enum class State { kReady, kWaiting, kDone };

struct Fibre {
  std::unique_ptr<char[]> stack;
  ucontext_t start;
  jmp_buf resume;
  bool started;
  State state;
  unsigned index;
  Visit visit;
  uint64_t result;
};

std::vector<Fibre> fibres;
Fibre* current;
jmp_buf scheduler;
const std::function<void()>* body;
std::optional<std::string> error;

std::string place_of(unsigned index) {
  return "thread " + std::to_string(index) + " of block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) +
         ", " + std::to_string(blockIdx.z) + ")";
}

void leave() {
  if (_setjmp(current->resume) == 0) _longjmp(scheduler, 1);
}

void fibre_main() {
  for (;;) {
    try {
      (*body)();
    } catch (const std::exception& caught) {
      error = place_of(current->index) + ": " + caught.what();
    }
    current->state = State::kDone;
    leave();
  }
}

void make_fibres(unsigned count) {
  if (fibres.size() >= count && fibres.front().stack) return;
  fibres.resize(count);
  for (unsigned i = 0; i < count; i++) {
    Fibre& fibre = fibres[i];
    fibre.stack.reset(new char[kStackBytes]);
    fibre.index = i;
    fibre.started = false;
    getcontext(&fibre.start);
    fibre.start.uc_stack.ss_sp = fibre.stack.get();
    fibre.start.uc_stack.ss_size = kStackBytes;
    fibre.start.uc_link = nullptr;
    makecontext(&fibre.start, fibre_main, 0);
  }
}

void resume(Fibre& fibre) {
  current = &fibre;
  threadIdx = dim3(fibre.index, 0, 0);
  if (_setjmp(scheduler) != 0) return;
  if (fibre.started) _longjmp(fibre.resume, 1);
  fibre.started = true;
  setcontext(&fibre.start);
}

bool same_meeting(const Visit& a, const Visit& b) {
  return a.meeting == b.meeting && a.lane_mask == b.lane_mask && a.place.line() == b.place.line() &&
         a.place.column() == b.place.column() && !strcmp(a.place.file_name(), b.place.file_name());
}

std::string name_of(const Visit& visit) {
  return std::string(visit.place.file_name()) + ":" + std::to_string(visit.place.line());
}

// Fails unless all of `count` lanes are at the same meeting.
void check_meeting(const Fibre* lanes, unsigned count, const char* group) {
  for (unsigned i = 0; i < count; i++) {
    if (lanes[i].state == State::kDone) checked::fail(place_of(lanes[i].index) + " has left the others behind");
    if (!same_meeting(lanes[i].visit, lanes[0].visit))
      checked::fail(
          place_of(lanes[i].index) + " is at " + name_of(lanes[i].visit) + ", the first of its " + group + " at " +
          name_of(lanes[0].visit));
  }
}

// Gives every lane of a warp its result. All must be there.
void hold_meeting(Fibre* lanes) {
  bool any = false;
  for (unsigned i = 0; i < kWarpSize; i++) any |= lanes[i].visit.bits != 0;
  for (unsigned i = 0; i < kWarpSize; i++) {
    const Visit& visit = lanes[i].visit;
    lanes[i].result = visit.meeting == Meeting::kExchange ? lanes[i ^ visit.lane_mask].visit.bits : any;
    lanes[i].state = State::kReady;
  }
}

// Runs a warp until it is done, which it returns, or waits for the block's others.
bool run_warp(Fibre* lanes) {
  for (;;) {
    unsigned done = 0;
    for (unsigned i = 0; i < kWarpSize; i++) {
      Fibre& lane = lanes[last_lane_first ? kWarpSize - 1 - i : i];
      if (lane.state == State::kReady) resume(lane);
      if (error) checked::fail(*error);
      done += lane.state == State::kDone;
    }
    if (done == kWarpSize) return true;
    // A lane that has left while others wait is found here.
    check_meeting(lanes, kWarpSize, "warp");
    if (lanes[0].visit.meeting == Meeting::kSyncBlock) return false;
    hold_meeting(lanes);
  }
}

void run_block(unsigned threads) {
  memset(checked::shared, 0xff, sizeof(checked::shared));
  for (;;) {
    for (unsigned i = 0; i < threads; i++) fibres[i].state = State::kReady;
    unsigned done = 0;
    for (unsigned i = 0; i < threads; i += kWarpSize)
      done += run_warp(&fibres[last_lane_first ? threads - kWarpSize - i : i]);
    if (done == threads / kWarpSize) return;
    check_meeting(fibres.data(), threads, "block");
  }
}

}  // namespace

uint64_t meet(const Visit& visit) {
  current->visit = visit;
  current->state = State::kWaiting;
  leave();
  return current->result;
}

void run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  gridDim.y = std::min(gridDim.y, max_grid);
  gridDim.z = std::min(gridDim.z, max_grid);
  const unsigned threads = blockDim.x;
  if (threads == 0 || threads > 1024 || threads % kWarpSize || blockDim.y != 1 || config.gridDim.y > 65535 ||
      config.gridDim.z > 65535)
    checked::fail("a launch that the device would refuse");
  make_fibres(threads);
  body = &kernel;
  error.reset();
  try {
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; blockIdx.z++)
      for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) run_block(threads);
  } catch (...) {
    // Fibres that stand in the middle of the kernel are of no use to the next one.
    fibres.clear();
    throw;
  }
}

}  // namespace emulator
