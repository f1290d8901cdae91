// SPDX-License-Identifier: BSD-3-Clause
#include "emulator/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace resnet_fast::emu {
namespace {

constexpr std::size_t kPage = 65536;  // a multiple of the page size of every platform in use
constexpr std::size_t kStackBytes = 2 * kPage;
thread_local Fiber* starting = nullptr;  // handed to the trampoline, which takes no argument

char* allocate_stack() {
  void* memory = mmap(nullptr, kPage + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  // Below the stack lies a guard page: an overflow ends in a fault, not in a neighbour's stack.
  mprotect(memory, kPage, PROT_NONE);
  return static_cast<char*>(memory) + kPage;
}

}  // namespace

#if defined(__x86_64__)
// Pushes the registers a callee must keep, swaps stack pointers, pops the other side's.
extern "C" void resnet_fast_switch_stack(void** save, void* load);
asm(R"(
.text
.globl resnet_fast_switch_stack
.hidden resnet_fast_switch_stack
.type resnet_fast_switch_stack, @function
resnet_fast_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size resnet_fast_switch_stack, .-resnet_fast_switch_stack
)");
#endif

Fiber::~Fiber() {
  if (stack_) munmap(stack_ - kPage, kPage + kStackBytes);
}

void Fiber::reset(Entry entry, void* argument) {
  if (!stack_) stack_ = allocate_stack();
  entry_ = entry;
  argument_ = argument;
  fiber_fake_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  // A fiber abandoned after an error leaves its frames' red zones behind.
  if (abandoned_) __asan_unpoison_memory_region(stack_, kStackBytes);
#endif
  abandoned_ = true;
#if defined(__x86_64__)
  // Six registers and a return address; the trampoline sees the alignment a call would give.
  auto* top = reinterpret_cast<void**>(stack_ + kStackBytes - 16);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&Fiber::trampoline);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber_sp_ = top;
#else
  getcontext(&fiber_context_);
  fiber_context_.uc_stack.ss_sp = stack_;
  fiber_context_.uc_stack.ss_size = kStackBytes;
  fiber_context_.uc_link = nullptr;
  makecontext(&fiber_context_, &Fiber::trampoline, 0);
#endif
}

void Fiber::start_switch(void** fake_stack, const void* bottom, std::size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake_stack, bottom, size);
#else
  (void)fake_stack, (void)bottom, (void)size;
#endif
}

void Fiber::finish_switch(void* fake_stack, const void** bottom, std::size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, bottom, size);
#else
  (void)fake_stack, (void)bottom, (void)size;
#endif
}

void Fiber::trampoline() {
  Fiber* self = starting;
  self->finish_switch(nullptr, &self->scheduler_bottom_, &self->scheduler_size_);
  self->entry_(self->argument_);
  self->abandoned_ = false;
  self->suspend(true);
  std::abort();  // a finished fiber is never resumed
}

void Fiber::resume() {
  starting = this;
  start_switch(&scheduler_fake_, stack_, kStackBytes);
#if defined(__x86_64__)
  resnet_fast_switch_stack(&scheduler_sp_, fiber_sp_);
#else
  swapcontext(&scheduler_context_, &fiber_context_);
#endif
  finish_switch(scheduler_fake_, nullptr, nullptr);
}

void Fiber::suspend(bool last) {
  start_switch(last ? nullptr : &fiber_fake_, scheduler_bottom_, scheduler_size_);
#if defined(__x86_64__)
  resnet_fast_switch_stack(&fiber_sp_, scheduler_sp_);
#else
  swapcontext(&fiber_context_, &scheduler_context_);
#endif
  finish_switch(fiber_fake_, &scheduler_bottom_, &scheduler_size_);
}

}  // namespace resnet_fast::emu
