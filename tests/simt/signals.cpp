// A fault in a kernel becomes an error that names buffer, block and thread.
#include <dlfcn.h>
#include <signal.h>
#include <ucontext.h>

#include <algorithm>

#include "runtime.h"

namespace simt {
namespace {

struct sigaction old_actions[5];
constexpr int kSignals[5] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP};
stack_t old_stack;
alignas(16) char signal_stack[64 << 10];

void on_fault(int signal, siginfo_t* info, void* context) {
  if (current == nullptr) {  // not a kernel's fault: let it be what it is
    sigaction(signal, &old_actions[std::find(kSignals, kSignals + 5, signal) - kSignals], nullptr);
    return;
  }
  std::string text = describe_thread() + ": ";
  const void* pc = nullptr;
  const char* verb = "accesses";
#if defined(__x86_64__)
  const auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  pc = reinterpret_cast<const void*>(registers[REG_RIP]);
  verb = registers[REG_ERR] & 2 ? "writes" : "reads";
#elif defined(__aarch64__)
  pc = reinterpret_cast<const void*>(static_cast<ucontext_t*>(context)->uc_mcontext.pc);
#endif
  if (signal == SIGSEGV || signal == SIGBUS) {
    const Buffer* const b = buffer_at(info->si_addr);
    char address[32];
    snprintf(address, sizeof(address), "%p", info->si_addr);
    text += std::string(verb) + " out of bounds: " +
            (b == nullptr ? std::string("address ") + address + ", in no buffer" : place(*b, info->si_addr));
  } else {
    text += "an index outside its array, an integer overflow, a shift too far or a division by zero";
  }
  Dl_info module;
  if (pc != nullptr && dladdr(pc, &module) != 0) {
    char at[40];
    snprintf(at, sizeof(at), ", {pc %p}",
             reinterpret_cast<void*>(static_cast<const char*>(pc) - static_cast<const char*>(module.dli_fbase)));
    text += at;
  }
  abandon(text, cudaErrorIllegalAddress);
}

}  // namespace

void catch_faults() {
  stack_t own{};
  own.ss_sp = signal_stack;
  own.ss_size = sizeof(signal_stack);
  sigaltstack(&own, &old_stack);
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int i = 0; i < 5; ++i) sigaction(kSignals[i], &action, &old_actions[i]);
}

void release_faults() {
  for (int i = 0; i < 5; ++i) sigaction(kSignals[i], &old_actions[i], nullptr);
  sigaltstack(&old_stack, nullptr);
}

}  // namespace simt
