// What the files of the stand-in share. device.cpp is compiled against the headers of tests/simt, the others against
// CUDA's own, so that only plain types pass between them.
#pragma once

#include <cstddef>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

namespace standin {

using Lock = std::lock_guard<std::recursive_mutex>;
std::recursive_mutex& mutex();  // torch calls from the threads of its backward too

// ---- device.cpp: the machine of tests/ptx ----
void* allocate(size_t bytes, int device);  // nullptr: no memory is left
bool release(void* pointer);               // false: nothing begins there
int device_of(const void* pointer);        // -1: the host's
inline bool on_device(const void* pointer) { return device_of(pointer) >= 0; }
size_t bytes_used();
size_t bytes_in_all();
// "" or what is wrong. What was never written stays so in a copy.
std::string copy(void* to, const void* from, size_t bytes);
std::string fill(void* pointer, int value, size_t bytes);
void mark_written(const void* pointer, size_t bytes);

// These are given CUDA's own structures and return its error codes; report tells what a launch failed of.
int launch(int device, const void* config, const void* function, void** arguments, std::string* report);
int set_attribute(const void* function, int attribute, int value);
std::vector<std::vector<char>> copies_of_arguments(const void* function, void** arguments);
void register_kernel(const void* function, const char* name);
int attribute(int* value, int which);
long figure(const char* key);  // of the device model, as tests/simt names them
int blocks_per_sm(int threads, size_t dynamic_bytes);

// ---- queries.cpp ----
constexpr int kDevices = 2;  // alike, each with memory of its own that the other cannot reach
int current_device();        // of the calling thread
void log(const std::string& name, void* stream);
std::string readable(const std::string& mangled);

// ---- runtime.cpp ----
using Step = std::function<int()>;
// Does a step now; or, where the stream is being captured, keeps it for the graph.
int perform(void* stream, const std::string& name, Step step);
bool is_pinned(const void* pointer);
int failed(int error, const std::string& why);  // remembers both for cudaGetLastError and cudaGetErrorString

// ---- streams.cpp ----
bool recorded(void* stream, const Step& step);  // false: the stream is not being captured
void fall_asleep(void* stream);                 // it has work that ends when somebody waits for it
void wake(void* stream);
void wake_all();
bool of_this_device(void* stream);

}  // namespace standin
