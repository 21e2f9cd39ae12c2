/* depthwise.cu - gradient of a depthwise convolution's weight on the GPU.
 *
 *     dw[c, k] = sum_{b, o} dy[b, c, o] x[b, c / m, o stride + k dilation - padding]
 *
 * A block per weight entry: its threads walk over (b, o) and add up in a fixed order.
 */
#include "cuda.cuh"

template <typename T>
__global__ void weight_gradient(subspace_depthwise_args a, int64_t taps, const T *x, const T *dy, acc_t<T> *dweight)
{
    const int64_t channel = blockIdx.x / taps, in = a.in[0] * a.in[1] * a.in[2];
    const int64_t out = a.out[0] * a.out[1] * a.out[2];
    int64_t k = blockIdx.x % taps, at[3];
    for (int i = 2; i >= 0; i--) {
        at[i] = k % a.kernel[i] * a.dilation[i] - a.padding[i];
        k /= a.kernel[i];
    }
    double sum = 0;
    for (int64_t i = threadIdx.x; i < a.b * out; i += blockDim.x) {
        const int64_t b = i / out, o = i % out;
        const int64_t z = o / (a.out[1] * a.out[2]) * a.stride[0] + at[0];
        const int64_t y = o / a.out[2] % a.out[1] * a.stride[1] + at[1], w = o % a.out[2] * a.stride[2] + at[2];
        if (z < 0 || z >= a.in[0] || y < 0 || y >= a.in[1] || w < 0 || w >= a.in[2]) continue;
        const T *image = x + (b * a.c + channel / a.m) * in;
        sum += (double)((acc_t<T>)dy[(b * a.c * a.m + channel) * out + o] *
                        (acc_t<T>)image[(z * a.in[1] + y) * a.in[2] + w]);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) dweight[blockIdx.x] = (acc_t<T>)sum;
}

template <typename T> static subspace_status gradient(subspace_ctx *ctx, const subspace_depthwise_args *a)
{
    const int64_t taps = a->kernel[0] * a->kernel[1] * a->kernel[2], count = a->c * a->m * taps;
    CHECK(ctx, count <= INT32_MAX, SUBSPACE_INVALID_ARGUMENT, "depthwise: a weight of %lld entries is too large",
          (long long)count);
    if (count > 0)
        LAUNCH(ctx, weight_gradient<T>, dim3((unsigned)count), dim3(ROW_THREADS), 0, *a, taps, (const T *)a->x,
               (const T *)a->dy, (acc_t<T> *)a->dweight);
    return SUBSPACE_OK;
}

extern "C" size_t subspace_depthwise_workspace_cuda(const subspace_ctx *, const subspace_depthwise_args *)
{
    return 0;
}

extern "C" subspace_status subspace_depthwise_cuda(subspace_ctx *ctx, const subspace_depthwise_args *a)
{
    TRY(subspace_depthwise_check(ctx, a));
    DISPATCH(a->dtype, gradient, ctx, a);
}
