// SPDX-License-Identifier: MIT
// What is remembered from one process to the next, in the user's cache: small files of text. No
// function raises: what cannot be remembered is measured again.
#pragma once

#include <string>

namespace convnn::cpu {

// The model of the processor: its name, family, model and stepping.
std::string processor_model();

// The file for what has this key; empty where nothing is to be remembered. Its folder is the one
// that CONVNN_CACHE names (0: none), or convnn_kernels in $XDG_CACHE_HOME or ~/.cache.
std::string remembered_file(const std::string& key);

// The text of a file; empty if it cannot be read.
std::string read_file(const std::string& path);

// Replaces the file at once, so that another process reads all of the old or of the new text.
// Creates its folders. Returns whether that was possible.
bool write_file(const std::string& path, const std::string& text);

}  // namespace convnn::cpu
