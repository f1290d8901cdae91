// SPDX-License-Identifier: BSD-3-Clause
// What a launch returns, and the handle of the stream it runs on. Free of CUDA and torch headers.
#pragma once

namespace resnet_fast {

// code 0 is success. Otherwise message says what went wrong; it stays valid until the next launch
// on the same OS thread.
struct Status {
  int code = 0;
  const char* message = "";
  bool ok() const { return code == 0; }
};

using Stream = void*;  // a cudaStream_t; ignored by the emulator

}  // namespace resnet_fast
