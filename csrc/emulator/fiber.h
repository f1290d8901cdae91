// SPDX-License-Identifier: BSD-3-Clause
// Fibers: one stack per emulated thread and a switch between two stacks that makes no system call.
// AddressSanitizer is told of every switch, so that it keeps watching the kernels' stacks.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace resnet_fast::emu {

class Fiber {
 public:
  using Entry = void (*)(void*);

  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  // Prepares the fiber to run entry(argument) from the start, whatever it did before.
  void reset(Entry entry, void* argument);
  // Called from the scheduler: runs the fiber until it suspends or finishes.
  void resume();
  // Called from inside the fiber: back to the scheduler; last = the fiber never runs again.
  void suspend(bool last);

 private:
  static void trampoline();
  void start_switch(void** fake_stack, const void* bottom, std::size_t size);
  void finish_switch(void* fake_stack, const void** bottom, std::size_t* size);

  char* stack_ = nullptr;
  Entry entry_ = nullptr;
  void* argument_ = nullptr;
  bool abandoned_ = false;      // started, and not run to its end
  void* fiber_fake_ = nullptr;  // AddressSanitizer's bookkeeping of the two stacks
  void* scheduler_fake_ = nullptr;
  const void* scheduler_bottom_ = nullptr;
  std::size_t scheduler_size_ = 0;
#if defined(__x86_64__)
  void* fiber_sp_ = nullptr;
  void* scheduler_sp_ = nullptr;
#else
  ucontext_t fiber_context_;
  ucontext_t scheduler_context_;
#endif
};

}  // namespace resnet_fast::emu
