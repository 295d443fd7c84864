// Numbers that are learned beside weights, in one pass over both: the noise of variational dropout with its
// divergence, and the eta-trick of LogSum. Part of dropblock.cpp; called by fallow/kernels/_learned.py.
//
// Formulas are those of fallow/noise/_learned.py and of Eta in fallow/sparsity/methods.py. Sums are in float
// over blocks, in double over those; logarithms of products, exponents apart, as in weights.h.
//
// At the ends of the range, noise: e^log is held in [e^-87, e^88] while its gradient goes on, infinite w^2 gives
// NaN where torch has inf, and NaN `log` a NaN gradient where torch has 0. The sums are then not finite, and
// torch's operations are asked instead; that of the eta-trick for any |logit| above 87.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr float offset = 1e-8f;  // beside w^2, as in fallow/noise/_learned.py
constexpr int64_t block = 2048;
constexpr float too_far = 3.4028235e38f / 87;  // times what is beyond 87: infinite

// e^x within two ulp, after Cephes; NaN stays.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f;  // rounds to a whole number, which is in the last bits
    int32_t whole;
    memcpy(&whole, &shifted, 4);
    float n = shifted - 12582912.0f;
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    int32_t bits = (int32_t)((uint32_t)(whole - 0x4b400000 + 127) << 23);
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

// log x of a normal number above 0, within two ulp, after Cephes.
inline float logarithm(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    int32_t high = (bits - 0x3f3504f3) >> 23;  // the mantissa to [sqrt(1/2), sqrt(2))
    bits -= (int32_t)((uint32_t)high << 23);
    float m, n = (float)high;
    memcpy(&m, &bits, 4);
    m -= 1;
    float z = m * m, p = 7.0376836292e-2f;
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    p = p * m * z - n * 2.12194440e-4f - 0.5f * z;
    return m + p + n * 0.693359375f;
}

// The sum of logarithms of terms of at least 1, and of what is added, `lanes` at a time.
struct Sum {
    float product[lanes], added[lanes];
    int32_t exponent[lanes];
    double total = 0;

    Sum() {
        for (int64_t j = 0; j < lanes; j++) product[j] = 1, added[j] = 0, exponent[j] = 0;
    }
    void multiply(int64_t j, float term) {
        float next = product[j] * term;
        int32_t bits;
        memcpy(&bits, &next, 4);
        exponent[j] += (bits >> 23) - 127;
        bits = (bits & 0x007fffff) | 0x3f800000;
        memcpy(&product[j], &bits, 4);
    }
    void flush() {
        for (int64_t j = 0; j < lanes; j++) total += added[j], added[j] = 0;
    }
    double logarithms() const {
        double found = 0;
        for (int64_t j = 0; j < lanes; j++)
            found += std::log((double)product[j]) + 0.6931471805599453 * exponent[j];
        return found;
    }
};

// Calls `each(i, j)` for all i, j its lane, and ends the blocks of the sum.
template <class Each>
inline void over(int64_t count, Sum& sum, Each each) {
    int64_t i = 0;
    while (i + lanes <= count) {
        int64_t end = count - i < block ? i + (count - i) / lanes * lanes : i + block;
        for (; i < end; i += lanes)
            for (int64_t j = 0; j < lanes; j++) each(i + j, j);
        sum.flush();
    }
    for (; i < count; i++) each(i, i % lanes);
    sum.flush();
}

// --- noise whose variance is learned ----------------------------------------------------------------------

// Of each weight the variance alpha w^2, or with `e` the weight with its noise.
template <bool additive, bool sampled>
void disturbed(const float* __restrict log, const float* __restrict w, const float* __restrict e,
               float* __restrict out, int64_t count, float clip, float least, float most) {
    for (int64_t i = 0; i < count; i++) {
        float value = w[i], square = value * value, learned = log[i];
        if (additive) {
            float size = square + offset, low = least * size, high = most * size;
            float variance = exponential(learned);
            variance = variance < low ? low : variance;
            variance = (variance > high ? high : variance) + size * 0;  // NaN where the weight is
            out[i] = sampled ? value + sqrtf(variance) * e[i] : variance;
        } else {
            learned = learned < -clip ? -clip : learned;
            learned = learned > clip ? clip : learned;
            if (sampled)
                out[i] = value + exponential(learned * 0.5f) * value * e[i];
            else
                out[i] = exponential(learned) * square;
        }
    }
}

// From the gradient of `disturbed` those of what is learned and of the weights.
template <bool additive, bool sampled>
void disturbed_back(const float* __restrict log, const float* __restrict w, const float* __restrict e,
                    const float* __restrict grad, float* __restrict log_grad, float* __restrict w_grad,
                    int64_t count, float clip, float least, float most) {
    float low_rate = sampled ? sqrtf(least) : least, high_rate = sampled ? sqrtf(most) : most;
    for (int64_t i = 0; i < count; i++) {
        float value = w[i], square = value * value, learned = log[i], g = grad[i];
        if (additive) {
            float size = square + offset, variance = exponential(learned);
            bool below = variance < least * size, above = variance > most * size, inside = !(below | above);
            float pull = sampled ? g * e[i] : g;
            float slope = sampled ? 0.5f * pull * sqrtf(variance) : pull * variance;
            log_grad[i] = inside ? slope : 0.0f;
            float bound = below ? low_rate : 0.0f;
            bound = above ? high_rate : bound;
            w_grad[i] = sampled ? g + pull * bound * value / sqrtf(size) : 2 * pull * bound * value;
        } else {
            bool below = learned < -clip, above = learned > clip, inside = !below & !above;
            learned = below ? -clip : learned;
            learned = above ? clip : learned;
            if (sampled) {
                float pull = g * exponential(learned * 0.5f) * e[i], slope = pull * value * 0.5f;
                log_grad[i] = inside ? slope : 0.0f;
                w_grad[i] = g + pull;
            } else {
                float pull = g * exponential(learned), slope = pull * square;
                log_grad[i] = inside ? slope : 0.0f;
                w_grad[i] = 2 * pull * value;
            }
        }
    }
}

// The divergence is log(1 + 1 / alpha) / 2 and a rest, a function of log alpha that is given as either of these.

// That of the published fit.
struct Fit {
    float operator()(float alpha, float& slope) const {
        constexpr float k1 = 0.63576f, k2 = 1.87320f, k3 = 1.48695f;
        float bend = exponential(k2 + k3 * alpha), step = 1 / (1 + bend);
        slope = -k1 * k3 * bend * step * step;
        return k1 * step;
    }
};

// Polynomials of degree 5 on equal intervals, coefficient by coefficient, in a variable from -1 to 1.
struct Polynomials {
    const float* table;
    int32_t intervals;
    float low, scale;

    float operator()(float alpha, float& slope) const {
        float position = (alpha - low) * scale, last = (float)intervals;
        position = position > 0 ? position : 0;  // NaN too, which must not be an index
        position = position < last ? position : last;
        int32_t index = (int32_t)position;
        index = index < intervals ? index : intervals - 1;
        float local = (position - (float)index) * 2 - 1;
        float value = table[5 * intervals + index];
        slope = 0;
        for (int32_t k = 4; k >= 0; k--) {
            slope = slope * local + value;
            value = value * local + table[k * intervals + index];
        }
        slope *= 2 * scale;
        return value;
    }
};

// The divergence over all weights, and its gradients. Not finite where a number is not.
template <bool additive, class Rest>
double diverged(const float* __restrict log, const float* __restrict w, float* __restrict log_grad,
                float* __restrict w_grad, int64_t count, float clip, Rest rest) {
    Sum sum;
    over(count, sum, [&](int64_t i, int64_t j) {
        float value = additive ? w[i] : 0.0f, size = value * value + offset;
        float found = additive ? log[i] - logarithm(size) : log[i];
        bool inside = (found >= -clip) & (found <= clip);
        float alpha = found < -clip ? -clip : found;
        alpha = alpha > clip ? clip : alpha;
        float ratio = exponential(-alpha), term = 1 + ratio, inverse = 1 / term;
        float slope, value_of_rest = rest(alpha, slope);
        slope = inside ? slope - 0.5f * ratio * inverse : 0.0f;
        log_grad[i] = slope;
        if (additive) w_grad[i] = -2 * slope * value / size;
        sum.multiply(j, term);
        // what the term has lost to rounding; and NaN from what is not finite
        float lost = (ratio - (term - 1)) * inverse;
        sum.added[j] += value_of_rest + 0.5f * lost + (found * 0 + size * 0);
    });
    return sum.total + 0.5 * sum.logarithms();
}

// --- the eta-trick ----------------------------------------------------------------------------------------

// strength / 2 sum (w^2 / eta + f(eta)) of LogSum, eta = strength e^logit, and its gradients.
double eta_trick(const float* __restrict w, const float* __restrict logit, float* __restrict w_grad,
                 float* __restrict logit_grad, int64_t count, float eps, float strength) {
    Sum sum;
    float half = 0.5f * strength, inverse_eps = 1 / eps;
    over(count, sum, [&](int64_t i, int64_t j) {
        float value = w[i], eta = strength * exponential(logit[i]);
        float wide = sqrtf(eps * eps + 4 * eta) + eps, inverse = 1 / wide;
        float share = 4 * eta * inverse;  // wide - 2 eps
        float rate = value / eta, square = rate * value;
        w_grad[i] = strength * rate;
        logit_grad[i] = half * (share * inverse - square);
        float excess = share * 0.5f * inverse_eps, term = 1 + excess;
        sum.multiply(j, term);
        float lost = (excess - (term - 1)) * (2 * eps * inverse);
        sum.added[j] += square - share * inverse + 2 * lost + (logit[i] * too_far * 0 + value * 0);
    });
    return 0.5 * strength * (sum.total + 2 * sum.logarithms());
}

}  // namespace

extern "C" {

void fallow_disturbed(const float* log, const float* w, const float* e, float* out, int64_t count,
                      int32_t additive, double clip) {
    float bound = (float)clip, least = (float)std::exp(-clip), most = (float)std::exp(clip);
    auto form = additive ? (e ? disturbed<true, true> : disturbed<true, false>)
                         : (e ? disturbed<false, true> : disturbed<false, false>);
    form(log, w, e, out, count, bound, least, most);
}

void fallow_disturbed_back(const float* log, const float* w, const float* e, const float* grad,
                           float* log_grad, float* w_grad, int64_t count, int32_t additive, double clip) {
    float bound = (float)clip, least = (float)std::exp(-clip), most = (float)std::exp(clip);
    auto form = additive ? (e ? disturbed_back<true, true> : disturbed_back<true, false>)
                         : (e ? disturbed_back<false, true> : disturbed_back<false, false>);
    form(log, w, e, grad, log_grad, w_grad, count, bound, least, most);
}

double fallow_diverged(const float* log, const float* w, float* log_grad, float* w_grad, int64_t count,
                       int32_t additive, double clip, const float* table, int32_t intervals, double low,
                       double scale) {
    if (table) {
        Polynomials rest = {table, intervals, (float)low, (float)scale};
        auto form = additive ? diverged<true, Polynomials> : diverged<false, Polynomials>;
        return form(log, w, log_grad, w_grad, count, (float)clip, rest);
    }
    auto form = additive ? diverged<true, Fit> : diverged<false, Fit>;
    return form(log, w, log_grad, w_grad, count, (float)clip, Fit());
}

double fallow_eta_trick(const float* w, const float* logit, float* w_grad, float* logit_grad, int64_t count,
                        double eps, double strength) {
    return eta_trick(w, logit, w_grad, logit_grad, count, (float)eps, (float)strength);
}
}
