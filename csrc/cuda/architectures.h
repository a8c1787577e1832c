// Which GPUs the code in this library runs on, by what nvcc was told to build.
#pragma once

namespace bn_ext {

// nvcc's codes as setup.py chose them, "sm_80,sm_90,compute_90"; empty in a build without CUDA.
const char* built_codes();

// Whether code for `codes` runs on a device of this capability (10 * major + minor). Binaries run on later devices of
// their generation, PTX (compute_*) on every later one; a letter binds to one device ("a") or one family ("f").
// Source: CUDA programming guide, "Binary compatibility", "PTX compatibility", "Feature set compiler targets".
bool runs_on(const char* codes, int capability);

}  // namespace bn_ext
