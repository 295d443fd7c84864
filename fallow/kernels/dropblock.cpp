// DropBlock in one pass over memory: every element times a factor, zero in the blocks of the seeds or where a
// mask says so. Plain functions on pointers, called through ctypes; no header of torch, no C++ library.
//
// Rounding is that of torch's `x * scalar`: once, to nearest even, half types by way of float.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

// What `spec` has, in this order; fallow/kernels/_dropblock.py writes it.
struct Spec {
    int64_t dtype;          // 0 float32, 1 float64, 2 bfloat16, 3 float16
    int64_t channels_last;  // memory is (rows, *map, channels), not (rows, channels, *map)
    int64_t shared;         // one mask for all channels of a row
    int64_t rows, channels;
    int64_t size[3];   // of a map, ones before the axes it lacks
    int64_t cells[3];  // of each axis, 1 for those it lacks
    int64_t block, disjoint;
    int64_t group;    // maps that one task handles
    int64_t large;    // the result does not fit into the last cache
    int64_t classes;  // of cells; `table` has, for each, first position, step, width and number of its columns
};

// --- numbers ----------------------------------------------------------------------------------------------

struct Float {
    using Bits = uint32_t;
    using Wide = float;
    static Bits times(Bits x, float factor) {
        float value;
        memcpy(&value, &x, 4);
        value *= factor;
        memcpy(&x, &value, 4);
        return x;
    }
};

struct Double {
    using Bits = uint64_t;
    using Wide = double;
    static Bits times(Bits x, double factor) {
        double value;
        memcpy(&value, &x, 8);
        value *= factor;
        memcpy(&x, &value, 8);
        return x;
    }
};

struct BFloat16 {
    using Bits = uint16_t;
    using Wide = float;
    static Bits times(Bits x, float factor) {
        uint32_t bits = Float::times(uint32_t(x) << 16, factor);
        uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
    }
};

#if defined(__F16C__) || defined(__aarch64__)
#define FALLOW_HAS_HALF 1
struct Half {
    using Bits = uint16_t;
    using Wide = float;
    static Bits times(Bits x, float factor) {
#if defined(__aarch64__)
        __fp16 value;
        memcpy(&value, &x, 2);
        value = float(value) * factor;
        memcpy(&x, &value, 2);
        return x;
#else
        return _cvtss_sh(_cvtsh_ss(x) * factor, 0);
#endif
    }
};
#endif

template <class T>
void scale(const typename T::Bits* x, typename T::Bits* out, int64_t n, typename T::Wide factor) {
    for (int64_t i = 0; i < n; i++) out[i] = T::times(x[i], factor);
}

// `keep` has all bits set, or none.
template <class T>
void select(const typename T::Bits* x, const typename T::Bits* keep, typename T::Bits* out, int64_t n,
            typename T::Wide factor) {
    for (int64_t i = 0; i < n; i++) out[i] = T::times(x[i], factor) & keep[i];
}

#if defined(__F16C__)  // which compilers do not use on their own
template <>
void scale<Half>(const uint16_t* x, uint16_t* out, int64_t n, float factor) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(x + i)));
        _mm_storeu_si128((__m128i*)(out + i), _mm256_cvtps_ph(_mm256_mul_ps(wide, _mm256_set1_ps(factor)), 0));
    }
    for (; i < n; i++) out[i] = Half::times(x[i], factor);
}

template <>
void select<Half>(const uint16_t* x, const uint16_t* keep, uint16_t* out, int64_t n, float factor) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(x + i)));
        __m128i half = _mm256_cvtps_ph(_mm256_mul_ps(wide, _mm256_set1_ps(factor)), 0);
        half = _mm_and_si128(half, _mm_loadu_si128((const __m128i*)(keep + i)));
        _mm_storeu_si128((__m128i*)(out + i), half);
    }
    for (; i < n; i++) out[i] = Half::times(x[i], factor) & keep[i];
}
#endif

// One line of the cache, written past it: where a result does not fit, a line that is written as a whole need
// not be read first. Half types are not faster for it.
#if defined(__AVX__)
inline void past(const float* x, const float* keep, float* out, float factor) {
    __m256 all = _mm256_set1_ps(factor);
    for (int i = 0; i < 16; i += 8) {
        __m256 product = _mm256_mul_ps(_mm256_loadu_ps(x + i), all);
        _mm256_stream_ps(out + i, _mm256_and_ps(product, _mm256_loadu_ps(keep + i)));
    }
}

inline void past(const double* x, const double* keep, double* out, double factor) {
    __m256d all = _mm256_set1_pd(factor);
    for (int i = 0; i < 8; i += 4) {
        __m256d product = _mm256_mul_pd(_mm256_loadu_pd(x + i), all);
        _mm256_stream_pd(out + i, _mm256_and_pd(product, _mm256_loadu_pd(keep + i)));
    }
}

inline void fence() { _mm_sfence(); }

template <class T>
constexpr bool has_past = sizeof(typename T::Bits) >= 4;
#else
template <class Wide>
void past(const Wide*, const Wide*, Wide*, Wide) {}

inline void fence() {}

template <class T>
constexpr bool has_past = false;
#endif

// --- blocks -----------------------------------------------------------------------------------------------

// Division by the same number again and again. Lemire, Kaser, Kurz: Faster remainder by direct computation.
struct Divisor {
    uint64_t base, inverse;
    explicit Divisor(uint64_t n) : base(n), inverse(n > 1 ? ~uint64_t(0) / n + 1 : 0) {}
    uint32_t of(uint32_t number) const {
#if defined(__SIZEOF_INT128__)
        return inverse ? uint32_t((unsigned __int128)inverse * number >> 64) : number;
#else
        return number / uint32_t(base);
#endif
    }
    // The last digit; the number becomes the others.
    uint32_t digit(uint32_t& number) const {
        uint32_t others = of(number), last = number - others * uint32_t(base);
        number = others;
        return last;
    }
};

// What covers a position, cut to the map.
struct Block {
    uint32_t map, low[3], high[3];
};

// Number i of a key's sequence: splitmix64.
inline uint64_t number(uint64_t key, int64_t i) {
    uint64_t z = key + uint64_t(i) * 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

// Poisson numbers from numbers 0, -1, -2 and so on, term by term as fallow/noise/_counts.py has them.
struct Poisson {
    uint64_t key;
    int64_t i = 0;

    double uniform() { return (double(number(key, i--) >> 11) + 0.5) * 0x1p-53; }

    static double log_factorial(int64_t n) {
        double shift = 1, k = double(n);
        while (k < 16) {
            k += 1;
            shift *= k;
        }
        double r = 1 / k;
        double series = r * (1. / 12 - r * r * (1. / 360 - r * r * (1. / 1260 - r * r / 1680)));
        return (k + 0.5) * log(k) - k + 0.9189385332046727 + series - log(shift);
    }

    int64_t operator()(double mean) {
        if (mean < 10) {
            int64_t count = 0;
            double product = uniform(), least = exp(-mean);
            for (; product > least; count++) product *= uniform();
            return count;
        }
        double b = 0.931 + 2.53 * sqrt(mean), a = -0.059 + 0.02483 * b;
        while (true) {
            double u = uniform() - 0.5, v = uniform(), us = 0.5 - fabs(u);
            double count = floor((2 * a / us + b) * u + mean + 0.43);
            if (us >= 0.07 && v <= 0.9277 - 3.6224 / (b - 2)) return int64_t(count);
            if (count < 0 || (us < 0.013 && v > us)) continue;
            double height = log(v * (1.1239 + 1.1328 / (b - 3.4)) / (a / (us * us) + b));
            if (height <= count * log(mean) - mean - log_factorial(int64_t(count))) return int64_t(count);
        }
    }
};

// The seeds of a key. They are numbered through all classes, from 1; each number gives a cell of its class:
// (column, map, cells of the other axes), where maps are those of all tasks. In order, what is kept of a cell is
// its class and column above, and its map and other axes within its task below.
struct Seeds {
    const Spec& spec;
    const int64_t* table;
    uint64_t key;
    Divisor depth, height, width, columnwise, taskwise;
    int64_t kinds, count = 0, counts[256];

    Seeds(const Spec& s, const int64_t* t, double intensity, uint64_t k, int64_t per)
        : spec(s), table(t), key(k), depth(s.cells[0]), height(s.cells[1]), width(tabled(s)),
          columnwise(s.cells[0] * s.cells[1] * tabled(s) * s.rows * (s.shared ? 1 : s.channels)),
          taskwise(s.cells[0] * s.cells[1] * tabled(s) * per), kinds(s.classes ? s.classes : 1) {
        Poisson poisson{key};
        for (int64_t kind = 0; kind < kinds; kind++) {
            count += counts[kind] = poisson(double(span(kind)) * intensity);
        }
    }

    // Cells of a class.
    uint64_t span(int64_t kind) const { return columnwise.base * (spec.classes ? table[4 * kind + 3] : 1); }

    // Cells of the last axis that count like those of the others.
    static int64_t tabled(const Spec& s) { return s.classes > 0 ? 1 : s.cells[2]; }

    template <class Visit>
    void each(Visit visit) const {
        int64_t index = 0;
        for (int64_t kind = 0; kind < kinds; kind++) {
            double cells = double(span(kind)) * 0x1p-53;
            for (int64_t i = 0; i < counts[kind]; i++) {
                uint32_t column = uint32_t(double(number(key, ++index) >> 11) * cells);
                uint32_t rest = columnwise.digit(column), task = taskwise.of(rest);
                uint64_t high = uint64_t(kind) << 24 | column;
                visit(task, high << 32 | (rest - task * uint32_t(taskwise.base)));
            }
        }
    }

    // Its map counts from the first of the task.
    Block block(uint64_t seed) const {
        Block found;
        uint32_t number = uint32_t(seed);
        if (spec.classes) {
            const int64_t* part = table + 4 * (seed >> 56);
            found.low[2] = uint32_t(part[0] + part[1] * int64_t(seed >> 32 & 0xffffff));
            found.high[2] = found.low[2] + uint32_t(part[2]);
        } else {
            place(found, 2, width.digit(number));
        }
        place(found, 1, height.digit(number));
        place(found, 0, depth.digit(number));
        found.map = number;
        return found;
    }

    void place(Block& found, int axis, int64_t at) const {
        int64_t low = spec.disjoint ? at * spec.block : at - (spec.block - 1);
        int64_t high = spec.disjoint ? low + spec.block : at + 1, size = spec.size[axis];
        found.low[axis] = uint32_t(low < 0 ? 0 : low);
        found.high[axis] = uint32_t(high > size ? size : high);
    }
};

// Zeros in so many bytes of each line of a block. Lines are short: a call of memset takes longer than its work.
template <class Lines>
void wipe(Lines lines, int64_t bytes) {
    const uint64_t zero[4] = {0, 0, 0, 0};
    if (bytes > 256) {
        lines([&](char* p) { memset(p, 0, bytes); });
    } else if (bytes > 32) {
        lines([&](char* p) {
            for (int64_t i = 0; i + 32 < bytes; i += 32) memcpy(p + i, zero, 32);
            memcpy(p + bytes - 32, zero, 32);
        });
    } else if (bytes >= 16) {
        lines([&](char* p) { memcpy(p, zero, 16), memcpy(p + bytes - 16, zero, 16); });
    } else if (bytes >= 8) {
        lines([&](char* p) { memcpy(p, zero, 8), memcpy(p + bytes - 8, zero, 8); });
    } else if (bytes >= 4) {
        lines([&](char* p) { memcpy(p, zero, 4), memcpy(p + bytes - 4, zero, 4); });
    } else {
        lines([&](char* p) {
            for (int64_t i = 0; i < bytes; i++) p[i] = 0;
        });
    }
}

// Zeros in a block of one map whose positions are `stride` elements apart.
template <class Bits>
void erase(Bits* map, const Spec& spec, const Block& block, int64_t stride) {
    auto lines = [&](auto visit) {
        for (int64_t d = block.low[0]; d < block.high[0]; d++) {
            Bits* line = map + ((d * spec.size[1] + block.low[1]) * spec.size[2] + block.low[2]) * stride;
            for (int64_t h = block.low[1]; h < block.high[1]; h++, line += spec.size[2] * stride) {
                visit((char*)line);
            }
        }
    };
    int64_t width = block.high[2] - block.low[2];
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    // Blocks that a border cuts are many on small maps. Lines are as many as in whole ones and each is one store
    // with a mask, so that no branch depends on where a block lies.
    int64_t widest = (spec.block < spec.size[2] ? spec.block : spec.size[2]) * sizeof(Bits);
    if (stride == 1 && widest <= 64) {
        int64_t tallest = spec.block < spec.size[1] ? spec.block : spec.size[1];
        int64_t last = block.high[1] - block.low[1] - 1, step = spec.size[2] * sizeof(Bits);
        uint64_t mask = ~uint64_t(0) >> (64 - width * sizeof(Bits));
        for (int64_t d = block.low[0]; d < block.high[0]; d++) {
            char* line = (char*)(map + (d * spec.size[1] + block.low[1]) * spec.size[2] + block.low[2]);
            for (int64_t h = 0; h < tallest; h++) {
                char* p = line + (h < last ? h : last) * step;
                if (widest <= 32) {
                    _mm256_mask_storeu_epi8(p, __mmask32(mask), _mm256_setzero_si256());
                } else {
                    _mm512_mask_storeu_epi8(p, mask, _mm512_setzero_si512());
                }
            }
        }
        return;
    }
#endif
    if (stride == 1) {
        wipe(lines, width * sizeof(Bits));
    } else {
        lines([&](char* line) {
            for (int64_t w = 0; w < width; w++) ((Bits*)line)[w * stride] = 0;
        });
    }
}

// --- passes -----------------------------------------------------------------------------------------------

template <class T>
struct Pass {
    using Bits = typename T::Bits;
    using Wide = typename T::Wide;
    static constexpr int64_t line = 64 / sizeof(Bits);
    const Spec& spec;
    const Bits* x;
    Bits* out;
    Wide factor;
    const Seeds& seeds;
    const uint64_t* order;  // seeds, those of a task one after the other
    const uint32_t* first;  // of each task
    const uint8_t* keep;    // a mask in place of seeds
    int64_t area;

    // Maps of their own: several of them while they are in the nearest cache.
    void maps(int64_t task, Bits*) const {
        int64_t count = spec.rows * spec.channels, begin = task * spec.group;
        int64_t many = count - begin < spec.group ? count - begin : spec.group;
        Bits* to = out + begin * area;
        if (keep) {
            masked(x + begin * area, keep + begin * area, to, many * area);
            return;
        }
        scale<T>(x + begin * area, to, many * area, factor);
        for (uint32_t i = first[task]; i < first[task + 1]; i++) {
            Block block = seeds.block(order[i]);
            erase(to + block.map * area, spec, block, 1);
        }
    }

    void masked(const Bits* from, const uint8_t* mask, Bits* to, int64_t n) const {
        Bits bits[1024];
        for (int64_t begin = 0; begin < n; begin += 1024) {
            int64_t many = n - begin < 1024 ? n - begin : 1024;
            widen(mask + begin, bits, many);
            select<T>(from + begin, bits, to + begin, many, factor);
        }
    }

    static void widen(const uint8_t* mask, Bits* bits, int64_t n) {
        for (int64_t i = 0; i < n; i++) bits[i] = Bits(0) - Bits(mask[i]);
    }

    // The channels of a row with one mask, which stays in cache.
    void row(int64_t task, Bits* bits) const {
        if (keep) {
            widen(keep + task * area, bits, area);
        } else {
            memset(bits, 255, area * sizeof(Bits));
            for (uint32_t i = first[task]; i < first[task + 1]; i++) {
                erase(bits, spec, seeds.block(order[i]), 1);
            }
        }
        int64_t begin = task * spec.channels * area, end = begin + spec.channels * area;
        if constexpr (has_past<T>) {
            if (spec.large && area >= line) {
                begin = lines(begin, end, bits);
            }
        }
        for (int64_t many; begin < end; begin += many) {
            int64_t at = begin % area;
            many = end - begin < area - at ? end - begin : area - at;
            select<T>(x + begin, bits + at, out + begin, many, factor);
        }
    }

    // Past the cache, line by line: they need not begin and end where channels do. Returns where it stops.
    int64_t lines(int64_t begin, int64_t end, Bits* bits) const {
        memcpy(bits + area, bits, line * sizeof(Bits));
        int64_t start = begin + int64_t(-(uintptr_t)(out + begin) & 63) / int64_t(sizeof(Bits));
        if (start > end) return begin;
        select<T>(x + begin, bits, out + begin, start - begin, factor);
        int64_t at = (start - begin) % area;
        for (begin = start; begin + line <= end; begin += line) {
#if defined(__GNUC__)
            __builtin_prefetch((const char*)(x + begin) + 8192);  // processors stop at the end of a page
#endif
            past((const Wide*)(x + begin), (const Wide*)(bits + at), (Wide*)(out + begin), factor);
            at += line;
            if (at >= area) at -= area;
        }
        fence();
        return begin;
    }

    // The same where channels are last: positions are runs of memory.
    void runs(int64_t task, Bits* scratch) const {
        const uint8_t* mask = keep ? keep + task * area : (uint8_t*)scratch;
        if (!keep) {
            memset(scratch, 1, area);
            for (uint32_t i = first[task]; i < first[task + 1]; i++) {
                erase((uint8_t*)scratch, spec, seeds.block(order[i]), 1);
            }
        }
        const Bits* from = x + task * area * spec.channels;
        Bits* to = out + task * area * spec.channels;
        for (int64_t begin = 0, end; begin < area; begin = end) {
            for (end = begin + 1; end < area && mask[end] == mask[begin];) end++;
            int64_t at = begin * spec.channels, many = (end - begin) * spec.channels;
            if (mask[begin]) {
                scale<T>(from + at, to + at, many, factor);
            } else {
                memset(to + at, 0, many * sizeof(Bits));
            }
        }
    }

    // Channels last with masks of their own.
    void scattered(int64_t task, Bits*) const {
        int64_t begin = task * area * spec.channels;
        scale<T>(x + begin, out + begin, area * spec.channels, factor);
        for (uint32_t i = first[task]; i < first[task + 1]; i++) {
            Block block = seeds.block(order[i]);
            erase(out + begin + block.map, spec, block, spec.channels);
        }
    }
};

struct Call {
    const int64_t *spec, *table;
    double intensity;
    uint64_t key;
    const void* x;
    void* out;
    double factor;
    const uint8_t* keep;
    char* scratch;
    int64_t room, threads;
};

template <class T>
void work(const Call& call, const Seeds& seeds, int64_t tasks, int64_t area, char* scratch);

template <class T>
int32_t run(const Call& call) {
    const Spec& spec = *(const Spec*)call.spec;
    bool rows = spec.channels_last || spec.shared;
    int64_t area = spec.size[0] * spec.size[1] * spec.size[2];
    int64_t tasks = rows ? spec.rows : (spec.rows * spec.channels + spec.group - 1) / spec.group;
    int64_t per = !rows ? spec.group : spec.shared ? 1 : spec.channels;
    Seeds seeds(spec, call.table, call.keep ? 0 : call.intensity, call.key, per);
    int64_t local = spec.shared ? call.threads * (area * sizeof(typename T::Bits) + 64) : 0;
    int64_t need = 8 * seeds.count + 4 * (tasks + 2) + 64 + local;
    alignas(8) char near[1 << 14];
    void* more = need > call.room && need > int64_t(sizeof near) ? malloc(need) : nullptr;
    if (need > call.room && need > int64_t(sizeof near) && !more) return 1;
    work<T>(call, seeds, tasks, area, more ? (char*)more : need <= call.room ? call.scratch : near);
    free(more);
    return 0;
}

template <class T>
void work(const Call& call, const Seeds& seeds, int64_t tasks, int64_t area, char* scratch) {
    using Bits = typename T::Bits;
    const Spec& spec = *(const Spec*)call.spec;
    bool rows = spec.channels_last || spec.shared;
    uint64_t* order = (uint64_t*)scratch;
    uint32_t* first = (uint32_t*)(order + seeds.count);
    Bits* local = (Bits*)(((uintptr_t)(first + tasks + 2) + 63) & ~(uintptr_t)63);
    if (!call.keep) {  // a counting sort; counts begin two places on, so that filling leaves first[task] right
        memset(first, 0, (tasks + 2) * sizeof(uint32_t));
        seeds.each([&](uint32_t task, uint64_t) { first[task + 2]++; });
        for (int64_t i = 2; i < tasks + 2; i++) first[i] += first[i - 1];
        seeds.each([&](uint32_t task, uint64_t seed) { order[first[task + 1]++] = seed; });
    }
    Pass<T> pass{spec, (const Bits*)call.x, (Bits*)call.out, (typename T::Wide)call.factor,
                 seeds, order, first, call.keep, area};
    auto work = !rows                 ? &Pass<T>::maps
                : !spec.channels_last ? &Pass<T>::row
                : spec.shared         ? &Pass<T>::runs
                                      : &Pass<T>::scattered;
#if defined(_OPENMP)
    int64_t threads = call.threads;
    if (threads > 1) {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t part = 0; part < threads; part++) {
            for (int64_t task = tasks * part / threads; task < tasks * (part + 1) / threads; task++) {
                (pass.*work)(task, local + part * (area + Pass<T>::line));
            }
        }
        return;
    }
#endif
    for (int64_t task = 0; task < tasks; task++) (pass.*work)(task, local);
}

}  // namespace

extern "C" {

// Whether the numbers of a dtype can be computed with.
int32_t fallow_dropblock_takes(int32_t dtype) {
#if defined(FALLOW_HAS_HALF)
    return dtype >= 0 && dtype <= 3;
#else
    return dtype >= 0 && dtype <= 2;
#endif
}

// Zeros in the blocks of the seeds or, with `keep`, where it is 0. `scratch` has `room` bytes; best 8 a seed, 4 a
// task, 128 more, and for every thread, with a shared mask, an element for every position and 64 bytes. Maps
// times cells of all axes are below 2^32, the columns of a class below 2^24, classes below 2^8. 0 if all is well.
int32_t fallow_dropblock(const int64_t* spec, const int64_t* table, double intensity, uint64_t key,
                         const void* x, void* out, double factor, const uint8_t* keep, void* scratch,
                         int64_t room, int64_t threads) {
    Call call{spec, table, intensity, key, x, out, factor, keep, (char*)scratch, room, threads};
    switch (((const Spec*)spec)->dtype) {
        case 0: return run<Float>(call);
        case 1: return run<Double>(call);
        case 2: return run<BFloat16>(call);
#if defined(FALLOW_HAS_HALF)
        case 3: return run<Half>(call);
#endif
    }
    return 1;
}
}

#include "weights.h"
#include "learned.h"
