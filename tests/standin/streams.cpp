// Streams, events and graphs. Work is done at the call, so they order nothing; a stream being captured keeps its work
// for the graph, and one that torch.cuda._sleep keeps busy is so until somebody waits for it.
#include <cuda_runtime_api.h>

#include <map>
#include <memory>
#include <set>

#include "standin.h"

#define API extern "C" __attribute__((visibility("default")))

namespace standin {
namespace {

struct Graph {
  unsigned long long id;
  cudaStream_t first;  // the stream whose capture it is
  std::vector<Step> steps;
};

struct Stream {
  int device = 0;
  uint64_t asleep = 0, woken = 0;  // by the clock: its last sleep, and the last wait for it
  std::shared_ptr<Graph> graph;
};

struct Event {
  void* stream = nullptr;
  uint64_t asleep = 0;
  std::shared_ptr<Graph> graph;
};

uint64_t clock = 0;
uintptr_t handles = 0x1000;
std::map<void*, Stream> streams;
std::map<void*, Event> events;
std::map<void*, std::shared_ptr<Graph>> graphs;  // and what is instantiated of them

template <class Map>
void* new_handle(Map* in) {
  const Lock lock(mutex());
  void* const handle = reinterpret_cast<void*>(handles += 16);
  (*in)[handle];
  return handle;
}

// The default one is that of the current device, under a handle that no other has.
Stream& at(void* stream) {
  return streams[stream ? stream : reinterpret_cast<void*>(uintptr_t{1} + static_cast<uintptr_t>(current_device()))];
}

bool awake(void* stream, uint64_t since) { return since <= at(stream).woken; }

cudaError_t not_ready() { return cudaErrorNotReady; }

}  // namespace

bool recorded(void* stream, const Step& step) {
  const Lock lock(mutex());
  Stream& s = at(stream);
  if (s.graph) s.graph->steps.push_back(step);
  return s.graph != nullptr;
}

void fall_asleep(void* stream) {
  const Lock lock(mutex());
  at(stream).asleep = ++clock;
}
void wake(void* stream) {
  const Lock lock(mutex());
  at(stream).woken = clock;
}
bool of_this_device(void* stream) {
  const Lock lock(mutex());
  return !stream || at(stream).device == current_device();
}
void wake_all() {
  const Lock lock(mutex());
  for (auto& [handle, stream] : streams) stream.woken = clock;
}

}  // namespace standin

using namespace standin;

// ---- streams ----

API cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = static_cast<cudaStream_t>(new_handle(&streams));
  at(*stream).device = current_device();
  return cudaSuccess;
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return cudaStreamCreate(stream); }
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return cudaStreamCreate(stream); }
API cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const Lock lock(mutex());
  streams.erase(stream);
  return cudaSuccess;
}
API cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return wake(stream), cudaSuccess; }
API cudaError_t cudaDeviceSynchronize() { return wake_all(), cudaSuccess; }
API cudaError_t cudaStreamQuery(cudaStream_t stream) {
  const Lock lock(mutex());
  return awake(stream, at(stream).asleep) ? cudaSuccess : not_ready();
}
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const Lock lock(mutex());
  if (events[event].graph) at(stream).graph = events[event].graph;  // it joins the capture
  return cudaSuccess;
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void* data) {
  return cudaError_t(perform(stream, "host", [=] { return call(data), 0; }));
}
API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void* data, unsigned) {
  return cudaError_t(perform(stream, "host", [=] { return call(stream, cudaSuccess, data), 0; }));
}

// ---- events ----

API cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = static_cast<cudaEvent_t>(new_handle(&events));
  return cudaSuccess;
}
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return cudaEventCreate(event); }
API cudaError_t cudaEventDestroy(cudaEvent_t event) {
  const Lock lock(mutex());
  events.erase(event);
  return cudaSuccess;
}
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const Lock lock(mutex());
  events[event] = {stream, at(stream).asleep, at(stream).graph};
  return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
API cudaError_t cudaEventQuery(cudaEvent_t event) {
  const Lock lock(mutex());
  return awake(events[event].stream, events[event].asleep) ? cudaSuccess : not_ready();
}
API cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const Lock lock(mutex());
  return wake(events[event].stream), cudaSuccess;
}
API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  return *milliseconds = 1, cudaSuccess;
}

// ---- graphs ----

API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  const Lock lock(mutex());
  static unsigned long long id = 0;
  if (at(stream).graph) return cudaError_t(failed(cudaErrorIllegalState, "the stream is being captured"));
  at(stream).graph = std::make_shared<Graph>(Graph{++id, stream, {}});
  return cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  const Lock lock(mutex());
  const auto made = at(stream).graph;
  *graph = nullptr;
  if (!made || made->first != stream) return cudaError_t(failed(cudaErrorIllegalState, "the capture is not its own"));
  for (auto& [handle, one] : streams) {
    if (one.graph == made) one.graph = nullptr;
  }
  for (auto& [handle, one] : events) {
    if (one.graph == made) one.graph = nullptr;
  }
  *graph = static_cast<cudaGraph_t>(new_handle(&graphs));
  graphs[*graph] = made;
  return cudaSuccess;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const Lock lock(mutex());
  *status = at(stream).graph ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                         cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData**,
                                         size_t* count) {
  const Lock lock(mutex());
  const auto made = at(stream).graph;
  if (id) *id = made ? made->id : 0;
  if (graph) *graph = reinterpret_cast<cudaGraph_t>(made.get());
  if (nodes) *nodes = nullptr;
  if (count) *count = 0;
  return cudaStreamIsCapturing(stream, status);
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return *mode = cudaStreamCaptureModeRelaxed, cudaSuccess;
}
API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  const Lock lock(mutex());
  return *count = graphs[graph] ? graphs[graph]->steps.size() : 0, cudaSuccess;
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
  const Lock lock(mutex());
  *made = static_cast<cudaGraphExec_t>(new_handle(&graphs));
  graphs[*made] = graphs[graph];
  return cudaSuccess;
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  const Lock lock(mutex());
  const auto made = graphs[graph];
  return cudaError_t(perform(stream, "graph", [made] {
    for (const Step& step : made->steps) {
      if (const int error = step(); error != cudaSuccess) return error;
    }
    return 0;
  }));
}
API cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  const Lock lock(mutex());
  graphs.erase(graph);
  return cudaSuccess;
}
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  const Lock lock(mutex());
  graphs.erase(graph);
  return cudaSuccess;
}
API cudaError_t cudaUserObjectCreate(cudaUserObject_t* made, void*, cudaHostFn_t, unsigned, unsigned) {
  return *made = nullptr, cudaSuccess;
}
API cudaError_t cudaUserObjectRelease(cudaUserObject_t, unsigned) { return cudaSuccess; }
API cudaError_t cudaGraphRetainUserObject(cudaGraph_t, cudaUserObject_t, unsigned, unsigned) { return cudaSuccess; }
