#include "architectures.h"

#include <sstream>
#include <string>

// A list with commas on the compiler's command line, so that no quotes have to get through shells.
#ifdef BN_EXT_CUDA_CODES
#define BN_EXT_TEXT(...) #__VA_ARGS__
#define BN_EXT_TEXT_OF(...) BN_EXT_TEXT(__VA_ARGS__)
#else
#define BN_EXT_CUDA_CODES
#define BN_EXT_TEXT_OF(...) ""
#endif

namespace bn_ext {

const char* built_codes() { return BN_EXT_TEXT_OF(BN_EXT_CUDA_CODES); }

bool runs_on(const char* codes, int capability) {
  std::istringstream words{codes};
  for (std::string word; std::getline(words, word, ',');) {
    const std::string::size_type line = word.find('_');
    const int built = std::stoi(word.substr(line + 1));
    const char letter = word.back();
    const bool family = letter == 'f' || word.compare(0, line, "sm") == 0;
    if (letter == 'a' ? built == capability : built <= capability && (!family || built / 10 == capability / 10)) {
      return true;
    }
  }
  return false;
}

}  // namespace bn_ext
