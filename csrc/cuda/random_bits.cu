// random_bits on a GPU: a thread takes one counter.
#include "row.cuh"

namespace cmt::cuda {
namespace {

__global__ void __launch_bounds__(256) bits_kernel(RandomBits a) {
  int64_t at = blockIdx.x * int64_t(256) + threadIdx.x;
  if (at >= a.rows * a.blocks) return;
  uint32_t c0 = uint32_t(at % a.blocks), c1 = uint32_t(a.sample[at / a.blocks]), c2 = a.step, c3 = a.stream;
  uint32_t k0 = a.seed, k1 = a.stage;
#pragma unroll
  for (int round = 0; round < 10; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) philox_round(c0, c1, c2, c3, k0, k1);
  longlong2* out = reinterpret_cast<longlong2*>(a.out + 4 * at);
  out[0] = {c0, c1};
  out[1] = {c2, c3};
}

}  // namespace

void random_bits(const RandomBits& a, const Context& context) {
  int64_t n = a.rows * a.blocks;
  bits_kernel<<<unsigned((n + 255) / 256), 256, 0, static_cast<cudaStream_t>(context.stream)>>>(a);
  check_launch("random_bits");
}

}  // namespace cmt::cuda
