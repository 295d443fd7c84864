// Sparse training in one pass over the weights: what takes torch eight operations is a tenth of a small
// network's step. Part of dropblock.cpp, which is the library; called by fallow/kernels/_weights.py.
//
// Formulas and roundings are those of fallow/sparsity/totals.py and methods.py but for the sum, which
// multiplies all terms of a lane and keeps the exponents apart: no logarithm until the end.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t lanes = 32;

// Add log(1 + |w| / eps) over w, write factor sign(w) / (|w| + eps) to out. Not finite where a weight is not.
double logsum(const float* w, float* out, int64_t count, float inverse_eps, float scale) {
    float product[lanes];
    int32_t exponent[lanes];
    float unusual[lanes];
    for (int64_t j = 0; j < lanes; j++) product[j] = 1, exponent[j] = 0, unusual[j] = 0;
    auto each = [&](int64_t i, int64_t j) {
        float value = w[i];
        float term = 1 + fabsf(value) * inverse_eps;
        float sign = value > 0 ? scale : value < 0 ? -scale : value;
        out[i] = sign / term;
        unusual[j] += value * 0 + term * 0;
        // a product of two numbers in [1, 2) and of one power of two: its exponent goes to a count
        float next = product[j] * term;
        int32_t bits;
        memcpy(&bits, &next, 4);
        exponent[j] += (bits >> 23) - 127;
        bits = (bits & 0x007fffff) | 0x3f800000;
        memcpy(&product[j], &bits, 4);
    };
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes)
        for (int64_t j = 0; j < lanes; j++) each(i + j, j);
    for (; i < count; i++) each(i, i % lanes);
    double total = 0;
    for (int64_t j = 0; j < lanes; j++)
        total += std::log((double)product[j]) + 0.6931471805599453 * exponent[j] + unusual[j];
    return total;
}

// w / (1 + strength step / eta), eta = |w| (|w| + eps); with `second` each weight's step is
// rate / (sqrt(second) correction + offset).
void adaprox(float* w, const float* second, int64_t count, float eps, float pull, float correction,
             float offset) {
    if (second)
        for (int64_t i = 0; i < count; i++) {
            float size = fabsf(w[i]);
            float step = pull / (sqrtf(second[i]) * correction + offset);
            w[i] /= 1 + step / (size * (size + eps));
        }
    else
        for (int64_t i = 0; i < count; i++) {
            float size = fabsf(w[i]);
            w[i] /= 1 + pull / (size * (size + eps));
        }
}

// The prox of step log(|w| + eps): |w| less step / u, u the larger root of u^2 - (|w| + eps) u + step; 0 up to
// the threshold, where there may be no root.
void prox(const float* w, float* out, int64_t count, float eps, float step, float threshold) {
    for (int64_t i = 0; i < count; i++) {
        float size = fabsf(w[i]), u = size + eps, under = u * u - 4 * step;
        float move = 2 * step / (u + sqrtf(under > 0 ? under : 0));
        float x = w[i] - copysignf(move, w[i]);
        out[i] = size > threshold ? x : 0;
    }
}

}  // namespace

extern "C" {

double fallow_logsum(const float* w, float* out, int64_t count, double eps, double factor) {
    return logsum(w, out, count, (float)(1 / eps), (float)(factor / eps));
}

void fallow_logsum_prox(const float* w, float* out, int64_t count, double eps, double step, double threshold) {
    prox(w, out, count, (float)eps, (float)step, (float)threshold);
}

void fallow_logsum_adaprox(float* w, const float* second, int64_t count, double eps, double pull,
                           double correction, double offset) {
    adaprox(w, second, count, (float)eps, (float)pull, (float)correction, (float)offset);
}
}
