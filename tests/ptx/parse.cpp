// The text of a module: its kernels' declarations, labels and statements. Only what nvcc emits for csrc/cuda.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <sstream>
#include <string_view>

#include "decode.h"

namespace ptx {

struct Module {
  std::string path;
  std::string_view text;  // the file itself, mapped: all libraries and processes share it
  std::map<std::string, std::pair<size_t, uint32_t>> entries;  // name -> position, line
  std::map<std::string, Kernel> kernels[2];                    // as they are, and contracted
  std::vector<std::string> externs;                            // dynamic shared memory
};

namespace {

uint32_t rounded_up(uint32_t v, uint32_t to) { return (v + to - 1) / to * to; }

// ".param .align 8 .b8 name[16]", ".shared .align 4 .f32 name"
struct Declaration {
  std::string name;
  uint32_t align = 0, size = 0;
  explicit Declaration(const std::string& text) {
    std::stringstream in(text);
    Type type = tNone;
    uint32_t count = 1;
    for (std::string word; in >> word;) {
      if (word == ".align") {
        in >> align;
      } else if (word == ".ptr") {  // what follows is of the pointee
        break;
      } else if (word[0] == '.') {
        if (const Type t = type_named(word.substr(1)); t != tNone) type = t;
      } else {
        name = word;
      }
    }
    if (name.empty()) {  // after .ptr
      for (std::string word; in >> word;) name = word;
      align = 0;
    }
    if (const size_t open = name.find('['); open != std::string::npos) {
      count = static_cast<uint32_t>(std::stoul(name.substr(open + 1)));
      name = name.substr(0, open);
    }
    size = count * static_cast<uint32_t>(size_of(type));
    if (align == 0) align = static_cast<uint32_t>(size_of(type));
  }
};

struct Parser final : Names {
  Module& m;
  Kernel& k;
  std::vector<std::map<std::string, int32_t>> registers{{}};  // by scope
  std::map<std::string, int32_t> labels;
  std::map<std::string, uint32_t> params, shared;
  std::map<uint64_t, int32_t> constant_at;
  std::vector<std::pair<size_t, std::string>> branches;
  uint32_t line = 0;

  Parser(Module& module, Kernel& kernel) : m(module), k(kernel) { k.constants.push_back(0); }  // ~0 means none

  [[noreturn]] void wrong(const std::string& what) override { fail(m.path + ":" + std::to_string(line) + ": " + what); }

  int32_t constant(uint64_t v) {
    const auto [at, fresh] = constant_at.try_emplace(v, static_cast<int32_t>(k.constants.size()));
    if (fresh) k.constants.push_back(v);
    return ~at->second;
  }

  int32_t reg(const std::string& name) override {
    if (name == "_") return -1;
    for (size_t s = registers.size(); s-- > 0;) {
      const auto at = registers[s].find(name);
      if (at != registers[s].end()) return at->second;
    }
    wrong("no register " + name);
  }

  int32_t source(const std::string& s, Type type) override {
    if (s.empty()) wrong("an empty operand");
    if (s[0] == '%') return reg(s);
    if (s == "true") return constant(1);
    if (s == "false") return constant(0);
    const bool bits = s.size() > 2 && s[0] == '0' && strchr("fFdD", s[1]);
    if (bits) return constant(std::stoull(s.substr(2), nullptr, 16));
    if (isdigit(static_cast<unsigned char>(s[0])) || s[0] == '-') {
      if (is_float(type)) wrong("a decimal number as a float: " + s);
      if (s[0] != '-') return constant(std::stoull(s, nullptr, 0));
      return constant(uint64_t{0} - std::stoull(s.substr(1), nullptr, 0));
    }
    const size_t plus = s.find('+');
    const std::string name = trim(s.substr(0, plus));
    const uint64_t more = plus == std::string::npos ? 0 : static_cast<uint64_t>(std::stoll(s.substr(plus + 1)));
    if (const auto at = params.find(name); at != params.end()) return constant(kParamWindow | (at->second + more));
    if (const auto at = shared.find(name); at != shared.end()) return constant(at->second + more);
    wrong("the operand " + s);
  }

  void branch_to(const std::string& label) override { branches.emplace_back(k.code.size(), label); }

  // .reg .b32 %r<10>; or .reg .b64 %tmp; or several by commas
  void declare_registers(const std::string& s) {
    const size_t type = s.find_first_of(" \t", s.find('.', 1));
    for (const std::string& name : split(s.substr(type), ',')) {
      const size_t open = name.find('<');
      if (open == std::string::npos) {
        registers.back()[name] = static_cast<int32_t>(k.registers++);
        continue;
      }
      for (int n = 0; n < std::stoi(name.substr(open + 1)); ++n) {
        registers.back()[name.substr(0, open) + std::to_string(n)] = static_cast<int32_t>(k.registers++);
      }
    }
  }

  void declare_shared(const std::string& s) {
    const Declaration d(s);
    if (d.size == 0) wrong("shared memory of no size: " + s);
    k.static_shared = rounded_up(k.static_shared, d.align);
    shared[d.name] = kSharedBase + k.static_shared;
    k.static_shared += d.size;
  }

  void statement(const std::string& s, const char* text, size_t length) {
    if (s.rfind(".reg", 0) == 0) return declare_registers(s);
    if (s.rfind(".shared", 0) == 0 || s.rfind(".pragma", 0) == 0) return;
    if (s[0] == '.') wrong("a directive that is not supported: " + s);
    Ins i = decode(s, *this);
    i.line = line;
    i.text = text, i.length = static_cast<uint32_t>(length);
    k.code.push_back(i);
  }

  void parameters(const std::string& list) {
    for (const std::string& one : split(list, ',')) {
      const Declaration d(one);
      if (d.size == 0) wrong("a parameter of no size: " + one);
      k.param_bytes = rounded_up(k.param_bytes, d.align);
      params[d.name] = k.param_bytes;
      k.params.push_back({k.param_bytes, d.size});
      k.param_bytes += d.size;
    }
  }

  // .maxntid 256, 1, 1 and its like
  void directives(const std::string& text) {
    std::stringstream in(text);
    for (std::string word; in >> word;) {
      if (word == ".maxntid") {
        in >> k.max_threads;
      } else if (word == ".minnctapersm") {
        in >> k.least_blocks;
      } else if (word[0] == '.') {
        wrong("a directive that is not supported: " + word);
      }
    }
  }

  // Static shared memory comes before dynamic, whose address instructions need.
  void shared_memory(std::string_view body) {
    for (size_t at = 0; (at = body.find(".shared ", at)) != std::string::npos; ++at) {
      const bool begins = at > 0 && isspace(static_cast<unsigned char>(body[at - 1]));
      if (begins) declare_shared(trim(std::string(body.substr(at, body.find(';', at) - at))));
    }
    k.dynamic_base = kSharedBase + rounded_up(k.static_shared, 16);
    for (const std::string& name : m.externs) shared[name] = k.dynamic_base;
  }

  bool is_label(const std::string& one) const {
    return (one[0] == '$' || one[0] == '_' || isalpha(static_cast<unsigned char>(one[0]))) &&
           one.find_first_of(" \t,:") == std::string::npos;
  }

  void statements(size_t from, size_t to) {
    const std::string_view body = m.text;
    std::string one;
    size_t begin = 0;
    bool began = false;
    for (size_t p = from; p < to; ++p) {
      const char c = body[p];
      line += c == '\n';
      if (c == '/' && body[p + 1] == '/') {
        while (p + 1 < to && body[p + 1] != '\n') ++p;
        continue;
      }
      if (!began) {
        if (isspace(static_cast<unsigned char>(c)) || c == ';') continue;
        if (c == '{') {
          registers.emplace_back();
          continue;
        }
        if (c == '}') {
          registers.pop_back();
          continue;
        }
        began = true;
        begin = p;
        one.clear();
      }
      if (c == ';') {
        statement(trim(one), body.data() + begin, p - begin);
        began = false;
      } else if (c == ':' && body[p + 1] != ':' && is_label(one)) {
        labels[one] = static_cast<int32_t>(k.code.size());
        began = false;
      } else {
        one += c == '\n' ? ' ' : c;
      }
    }
  }

  void run(size_t at, uint32_t first_line) {
    const std::string_view text = m.text;
    line = first_line;
    const size_t open = text.find('(', at), close = text.find(')', open), body = text.find('{', close);
    const size_t end = text.find("\n}\n", body);
    parameters(std::string(text.substr(open + 1, close - open - 1)));
    directives(std::string(text.substr(close + 1, body - close - 1)));
    line += static_cast<uint32_t>(std::count(text.begin() + at, text.begin() + body + 1, '\n'));
    shared_memory(text.substr(body + 1, end - body));
    statements(body + 1, end + 1);
    for (const auto& [ins, label] : branches) {
      const auto target = labels.find(label);
      if (target == labels.end()) wrong("no label " + label);
      k.code[ins].target = target->second;
    }
  }
};

std::string_view mapped(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY);
  struct stat about{};
  if (file < 0 || fstat(file, &about) != 0 || about.st_size == 0) fail("no file " + path);
  void* const at = mmap(nullptr, about.st_size, PROT_READ, MAP_PRIVATE, file, 0);
  close(file);
  if (at == MAP_FAILED) fail("no memory for " + path);
  return {static_cast<const char*>(at), static_cast<size_t>(about.st_size)};
}

}  // namespace

Module* load_module(const std::string& path) {
  auto m = std::make_unique<Module>();
  m->path = path;
  m->text = mapped(path);
  uint32_t line = 1;
  for (size_t at = 0; at < m->text.size(); ++line) {
    const size_t end = std::min(m->text.find('\n', at), m->text.size());
    if (m->text[at] == '.') {
      const std::string one(m->text.substr(at, end - at));
      const size_t entry = one.find(".entry ");
      if (entry != std::string::npos) {
        m->entries[trim(one.substr(entry + 7, one.find('(') - entry - 7))] = {at, line};
      } else if (one.rfind(".extern .shared", 0) == 0) {
        const size_t bracket = one.find('['), space = one.rfind(' ', bracket);
        m->externs.push_back(one.substr(space + 1, bracket - space - 1));
      } else if (one.rfind(".version", 0) && one.rfind(".target", 0) && one.rfind(".address_size", 0) &&
                 one.rfind(".maxntid", 0) && one.rfind(".minnctapersm", 0)) {
        fail(path + ":" + std::to_string(line) + ": a directive that is not supported: " + one);
      }
    }
    at = end + 1;
  }
  return m.release();
}

std::vector<std::string> entries_of(Module* m) {
  std::vector<std::string> r;
  for (const auto& e : m->entries) r.push_back(e.first);
  return r;
}

void forget_kernels(Module* m) { m->kernels[0].clear(), m->kernels[1].clear(); }

Kernel* find_kernel(Module* m, const std::string& name, bool contracts) {
  auto& kernels = m->kernels[contracts];
  if (const auto have = kernels.find(name); have != kernels.end()) return &have->second;
  const auto at = m->entries.find(name);
  if (at == m->entries.end()) return nullptr;
  Kernel k;
  k.name = name;
  k.file = m->path.substr(m->path.rfind('/', m->path.rfind('/') - 1) + 1);
  Parser(*m, k).run(at->second.first, at->second.second);
  if (contracts) contract(&k);
  return &(kernels[name] = std::move(k));
}

}  // namespace ptx
