// random_bits on a CPU: as many counters side by side as a vector has lanes.
#include "../kernels.h"
#include "../row_math.h"

namespace cmt::CMT_ISA {

void random_bits(const RandomBits& a, const Context& context) {
  constexpr int N = CMT_LANES;
  parallel(context, a.rows, grain_of(16 * a.blocks), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      uint32_t sample = uint32_t(a.sample[row]);
      for (int64_t first = 0; first < a.blocks; first += N) {
        uint32_t c0[N], c1[N], c2[N], c3[N], k0 = a.seed, k1 = a.stage;
        for (int i = 0; i < N; ++i) c0[i] = uint32_t(first) + i, c1[i] = sample, c2[i] = a.step, c3[i] = a.stream;
        for (int round = 0; round < 10; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1)
          for (int i = 0; i < N; ++i) philox_round(c0[i], c1[i], c2[i], c3[i], k0, k1);
        int64_t n = a.blocks - first < N ? a.blocks - first : N;
        int64_t* out = a.out + (row * a.blocks + first) * 4;
        for (int64_t i = 0; i < n; ++i) {
          out[4 * i] = c0[i], out[4 * i + 1] = c1[i], out[4 * i + 2] = c2[i], out[4 * i + 3] = c3[i];
        }
      }
    }
  });
}

}  // namespace cmt::CMT_ISA
