// A stand-in for libcusparseLt.so.0 on a CPU, for test_cusparselt.py.
//
// Arguments and numbers are those of cusparseLt.h; what is "compressed" is the dense weight. A call
// that is refused answers 3 and is counted. Every struct is filled up to the size of the header's.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <set>

enum Type { FLOAT16 = 2, BFLOAT16 = 14 };
enum Order { COLUMNS = 1, ROWS = 2 };
enum Operation { AS_IS, TRANSPOSED };
enum Compute { INT32, IN_FLOAT16, IN_FLOAT32 };
enum Kind { HANDLE, MATRIX, CHOICE, PLAN };

struct Handle {};
struct Matrix {
  int64_t rows, cols, ld; Type type; Order order; bool sparse;
  int64_t at(int64_t r, int64_t c) const { return order == ROWS ? r * ld + c : c * ld + r; }
};
struct Matmul { const Matrix *a, *b, *d; const uint16_t* bias; };
struct Choice { const Matmul* matmul; int number; };
struct Plan { const Handle* handle; const Matmul* matmul; const Choice* choice; };

static std::set<const void*> live[4];
static std::mutex mutex;
extern "C" {
int64_t plans_made, refused, fails_after = -1;
void* stream_seen;
int64_t how_many(int kind) { return live[kind].size(); }
}

#define DO(name) extern "C" int cusparseLt##name
#define REQUIRE(fact) do { if (!(fact)) { ++refused; return 3; } } while (0)
#define BEGIN \
  std::lock_guard<std::mutex> lock(mutex); REQUIRE(fails_after < 0 || fails_after-- != 0)
#define LIVE(kind, at) REQUIRE(live[kind].count(at))
#define NEW(kind, at) REQUIRE(live[kind].insert(at).second); FILL(at)
#define FILL(at) REQUIRE(aligned(at)); memset((void*)(at), 0xA5, STRUCT)
#define END(kind, at) REQUIRE(live[kind].erase(at)); memset((void*)(at), 0, 32); return 0

static bool aligned(const void* at) { return at && (uintptr_t)at % 16 == 0; }

DO(Init)(Handle* handle) { BEGIN; NEW(HANDLE, handle); return 0; }
DO(Destroy)(const Handle* handle) { BEGIN; END(HANDLE, handle); }

static int describe(const Handle* handle, Matrix* out, uint32_t alignment, const Matrix& given) {
  BEGIN; LIVE(HANDLE, handle); NEW(MATRIX, out);
  *out = given;
  const int64_t rows = given.rows, cols = given.cols, multiple = given.sparse ? 16 : 8;
  REQUIRE(rows > 0 && cols > 0 && rows % multiple == 0 && cols % multiple == 0);
  REQUIRE(given.order == ROWS || given.order == COLUMNS);
  REQUIRE(given.ld == (given.order == ROWS ? cols : rows) && alignment == 16);
  REQUIRE(given.type == FLOAT16 || given.type == BFLOAT16);
  return 0;
}
DO(DenseDescriptorInit)(const Handle* handle, Matrix* out, int64_t rows, int64_t cols, int64_t ld,
                        uint32_t alignment, Type type, Order order) {
  return describe(handle, out, alignment, {rows, cols, ld, type, order, false});
}
DO(StructuredDescriptorInit)(const Handle* handle, Matrix* out, int64_t rows, int64_t cols,
                             int64_t ld, uint32_t alignment, Type type, Order order, int sparsity) {
  REQUIRE(sparsity == 0);
  return describe(handle, out, alignment, {rows, cols, ld, type, order, true});
}
DO(MatDescriptorDestroy)(const Matrix* at) { BEGIN; END(MATRIX, at); }

DO(MatmulDescriptorInit)(const Handle* handle, Matmul* out, Operation op_a, Operation op_b,
                         const Matrix* a, const Matrix* b, const Matrix* c, const Matrix* d,
                         Compute compute) {
  BEGIN; LIVE(HANDLE, handle); LIVE(MATRIX, a); LIVE(MATRIX, b); LIVE(MATRIX, d);
  REQUIRE(c == d && op_a == AS_IS && op_b == TRANSPOSED && compute == IN_FLOAT32);
  REQUIRE(a->sparse && !b->sparse && !d->sparse && a->type == b->type && a->type == d->type);
  REQUIRE(a->cols == b->cols && a->rows == d->rows && b->rows == d->cols);
  FILL(out); *out = {a, b, d, nullptr};
  return 0;
}
DO(MatmulDescSetAttribute)(const Handle* handle, Matmul* out, int attribute, const void* data,
                           size_t size) {
  BEGIN; LIVE(HANDLE, handle); REQUIRE(attribute == 8 && size == sizeof out->bias);
  memcpy(&out->bias, data, size); REQUIRE(aligned(out->bias));
  return 0;
}

DO(MatmulAlgSelectionInit)(const Handle* handle, Choice* out, const Matmul* matmul, int which) {
  BEGIN; LIVE(HANDLE, handle); REQUIRE(which == 0);
  if (HAS_CHOICES) { NEW(CHOICE, out); } else { FILL(out); }
  *out = {matmul, 0};
  return 0;
}
DO(MatmulAlgSetAttribute)(const Handle* handle, Choice* out, int attribute, const void* data,
                          size_t size) {
  BEGIN; LIVE(HANDLE, handle); REQUIRE(attribute == 0 && size == sizeof out->number);
  memcpy(&out->number, data, size); REQUIRE(out->number >= 0 && out->number < ALGORITHMS);
  return 0;
}
#if HAS_CHOICES
DO(MatmulAlgSelectionDestroy)(const Choice* at) { BEGIN; END(CHOICE, at); }
#endif

static bool whole(const Plan& plan) {  // all that it reads is still there
  const Matmul& m = *plan.matmul;
  return live[HANDLE].count(plan.handle) && plan.choice->matmul == plan.matmul &&
         live[MATRIX].count(m.a) && live[MATRIX].count(m.b) && live[MATRIX].count(m.d);
}
DO(MatmulPlanInit)(const Handle* handle, Plan* out, const Matmul* matmul, const Choice* choice) {
  BEGIN; REQUIRE(whole({handle, matmul, choice})); NEW(PLAN, out);
  *out = {handle, matmul, choice}; ++plans_made;
  return 0;
}
DO(MatmulPlanDestroy)(const Plan* at) {
  BEGIN; LIVE(PLAN, at); REQUIRE(whole(*at)); END(PLAN, at);
}
DO(MatmulGetWorkspace)(const Handle* handle, const Plan* plan, size_t* size) {
  BEGIN; LIVE(HANDLE, handle); LIVE(PLAN, plan); *size = 4096 * plan->choice->number; return 0;
}

static double value(uint16_t bits, int digits) {
  const int one = 1 << digits, e = (bits & 0x7FFF) >> digits, bias = (1 << (14 - digits)) - 1;
  const double size = std::ldexp(bits % one + (e ? one : 0), (e ? e : 1) - bias - digits);
  return bits >> 15 ? -size : size;
}
static uint16_t rounded(double x, int digits) {  // 0 and normal numbers
  int e;
  const long m = std::lrint(std::ldexp(std::frexp(std::fabs(x), &e), digits + 1));
  const long bits = ((e - 3 + (1 << (14 - digits))) << digits) + m;
  return x == 0 ? 0 : x < 0 ? 0x8000 | bits : bits;
}
DO(Matmul)(const Handle* handle, const Plan* plan, const void* alpha, const void* at_a,
           const void* at_b, const void* beta, const void* at_c, void* at_d, void* workspace,
           void** streams, int32_t number_of_streams) {
  BEGIN; LIVE(PLAN, plan); REQUIRE(plan->handle == handle && whole(*plan));
  REQUIRE(aligned(at_a) && aligned(at_b) && aligned(at_d) && at_c == at_d);
  REQUIRE(*(const float*)alpha == 1 && *(const float*)beta == 0 && number_of_streams == 1);
  if (plan->choice->number) {
    REQUIRE(aligned(workspace)); memset(workspace, 0xFF, 4096 * plan->choice->number);
  }
  stream_seen = streams[0];
  const Matmul& m = *plan->matmul;
  const uint16_t *a = (const uint16_t*)at_a, *b = (const uint16_t*)at_b;
  const int digits = m.a->type == FLOAT16 ? 10 : 7;
  for (int64_t row = 0; row < m.d->rows; ++row)
    for (int64_t col = 0; col < m.d->cols; ++col) {
      double sum = m.bias ? value(m.bias[row], digits) : 0;
      for (int64_t k = 0; k < m.a->cols; ++k)
        sum += value(a[m.a->at(row, k)], digits) * value(b[m.b->at(col, k)], digits);
      ((uint16_t*)at_d)[m.d->at(row, col)] = rounded(sum, digits);
    }
  return 0;
}
