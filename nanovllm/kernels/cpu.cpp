// The CPU's kernels for bf16, fp16 and fp32: attention over pages, matrix products, norms, sampling.
//
// It has plain pointers and no torch headers, so it builds fast on first use (cpu.py).
// Python calls it through ctypes. The result of a row depends on that row alone: tiles have
// fixed places and are added in a fixed order, for every batch and every number of threads.

#include "vectors.h"

namespace {

// ----------------------------------------------------------------------------- attention

constexpr int ROWS = 24, TILE = 128, MAX_DIM = 512;  // query rows and keys of a tile; largest head
// Rows with four vectors of sums each. AVX2 has 16 registers, AVX-512 and Arm have 32.
constexpr int BLOCK = W == 8 ? 2 : 6;

struct Layer {
  void* pages;  // [pages][kv_heads][K, V]
  int64_t heads, kv_heads, head_dim, value_dim, padded_value_dim, block, window;
  float scale, softcap;  // a score is scale * (q . k), then softcap * tanh(score / softcap); 0: no softcap
};
struct Step {  // AttentionMetadata
  const int32_t *positions, *slots, *query_start, *context_lens, *tables;
  int64_t table_stride, tokens, sequences;
};

// K of a page is [head_dim / P][block][P], and V is [block / P][padded_value_dim][P].
// Products run along tokens for K and along dimensions for V, so they need no sums across
// lanes. The P elements of one step of a dot product lie side by side. V is padded to whole
// vectors. The padding may hold anything, because its products are never read.
template <class T> INLINE T* page(const Layer& layer, int64_t id, int64_t head) {
  return (T*)layer.pages + (id * layer.kv_heads + head) * layer.block * (layer.head_dim + layer.padded_value_dim);
}

// Llama rounds the quotient of a norm to T. Gemma does not: it rounds the product only.
template <class T> INLINE Vec quotient(Vec x, bool round_once) { return round_once ? x : rounded<T>(x); }

// What `write` does to each head of Q and K: a norm, unless its weights are null, then a
// rotation of the first `rotary_dim` numbers.
struct Rope {
  int head_dim, rotary_dim;
  float eps, norm_offset;
  bool round_once;  // see `quotient`
};

// WHOLE: the head is a number of whole vectors.
template <class T, bool WHOLE>
void norm_rope(const Rope& rope, const T* x, const T* weight, const float* cos_sin, T* out) {
  const int dim = rope.head_dim, half = rope.rotary_dim / 2;
  const auto left = [&](int i) { return WHOLE ? W : dim - i; };
  float y[MAX_DIM], z[MAX_DIM];
  Vec squares = {};
  for (int i = 0; i < dim; i += W) {
    store(y + i, load(x + i, left(i)));
    squares += load(y + i) * load(y + i);
  }
  const float scale = weight ? 1 / std::sqrt(sum(squares) / dim + rope.eps) : 1;
  for (int i = 0; weight && i < dim; i += W)
    store(y + i, rounded<T>(quotient<T>(load(y + i) * scale, rope.round_once) *
                            (load(weight + i, left(i)) + rope.norm_offset)));
  for (int i = 0; i < half; i++) {
    z[i] = y[i] * cos_sin[i] - y[i + half] * cos_sin[i + half];
    z[i + half] = y[i + half] * cos_sin[i] + y[i] * cos_sin[i + half];
  }
  for (int i = 2 * half; i < dim; i++) z[i] = y[i];
  for (int i = 0; i < dim; i += W) store(out + i, load(z + i), left(i));
}

// Writes one head of one token to its page.
template <class T> INLINE void put_head(const Layer& layer, int64_t slot, int head, const T* k, const T* v) {
  constexpr int P = Dot<T>::P;
  const int64_t block = layer.block, dim = layer.head_dim, at = slot % block;
  T* to = page<T>(layer, slot / block, head);
  T *to_k = to + at * P, *to_v = to + block * dim + (at - at % P) * layer.padded_value_dim + at % P;
  for (int d = 0; d < dim; d += P) std::memcpy(to_k + d * block, k + d, P * sizeof(T));
  for (int d = 0; d < layer.value_dim; d++) to_v[d * P] = v[d];
}

// A key is spread over many cache lines, one for each P dimensions. The cache lines of a
// token a little ahead are fetched while a token is written.
template <class T> INLINE void fetch_slot(const Layer& layer, const Step& step, int64_t token) {
  constexpr int P = Dot<T>::P;
  if (token >= step.tokens || step.slots[token] < 0) return;
  const int64_t block = layer.block, dim = layer.head_dim, at = step.slots[token] % block;
  for (int h = 0; h < layer.kv_heads; h++) {
    const T* to = page<T>(layer, step.slots[token] / block, h);
    for (int d = 0; d < dim; d += P) __builtin_prefetch(to + at * P + d * block, 1);
    const T* to_v = to + block * dim + (at - at % P) * layer.padded_value_dim;
    for (int d = 0; d < layer.value_dim * P; d += 64 / sizeof(T)) __builtin_prefetch(to_v + d, 1);
  }
}

// qkv [tokens][heads * head_dim, kv_heads * head_dim, kv_heads * value_dim]
template <class T>
void write(const Layer& layer, const Step& step, const T* qkv, int64_t heads, const float* cos_sin, int64_t rotary_dim,
           const T* q_norm, const T* k_norm, float eps, float norm_offset, int64_t round_once, T* q) {
  const int64_t dim = layer.head_dim, kv_heads = layer.kv_heads;
  const Rope rope = {int(dim), int(rotary_dim), eps, norm_offset, round_once != 0};
  const auto rotate_head = dim % W ? norm_rope<T, false> : norm_rope<T, true>;
  const int64_t keys_end = (heads + kv_heads) * dim, width = keys_end + kv_heads * layer.value_dim;
#pragma omp parallel for schedule(static) if (step.tokens * width > PARALLEL)
  for (int64_t t = 0; t < step.tokens; t++) {
    fetch_slot<T>(layer, step, t + 2);
    const T* x = qkv + t * width;
    const float* angles = cos_sin + step.positions[t] * rotary_dim;
    for (int h = 0; h < heads; h++) rotate_head(rope, x + h * dim, q_norm, angles, q + (t * heads + h) * dim);
    if (step.slots[t] < 0) continue;
    for (int h = 0; h < kv_heads; h++) {
      T k[MAX_DIM];
      rotate_head(rope, x + (heads + h) * dim, k_norm, angles, k);
      put_head(layer, step.slots[t], h, k, x + keys_end + h * layer.value_dim);
    }
  }
}

// The numbers of a head lie side by side. Tokens and heads may lie apart.
template <class T>
void store_heads(const Layer& layer, const Step& step, const T* k, int64_t k_token, int64_t k_head, const T* v,
                 int64_t v_token, int64_t v_head) {
#pragma omp parallel for schedule(static) if (step.tokens * layer.kv_heads * layer.head_dim > PARALLEL)
  for (int64_t t = 0; t < step.tokens; t++) {
    fetch_slot<T>(layer, step, t + 2);
    if (step.slots[t] < 0) continue;
    for (int h = 0; h < layer.kv_heads; h++)
      put_head(layer, step.slots[t], h, k + t * k_token + h * k_head, v + t * v_token + h * v_head);
  }
}

// The softmax of rows over some of their keys. Weights are relative to 2^max, so that
// states can be merged.
struct State {
  float max[ROWS], sum[ROWS], out[ROWS * MAX_DIM];

  void merge(const State& other, int rows, int dim) {
    for (int r = 0; r < rows; r++) {
      const float both = std::max(max[r], other.max[r]);
      if (both == -INFINITY) continue;
      const float mine = std::exp2(max[r] - both), theirs = std::exp2(other.max[r] - both);
      max[r] = both;
      sum[r] = sum[r] * mine + other.sum[r] * theirs;
      for (int d = r * dim; d < (r + 1) * dim; d += W) store(out + d, load(out + d) * mine + load(other.out + d) * theirs);
    }
  }
};

// cap * tanh(x) for the scores of one row and tile. e = 2^-2|x|log2(e) gives tanh from its
// definition. Small x would lose digits there, and take the first terms of the series.
INLINE void cap_scores(float* scores, int chunks, float scale, float cap) {
  for (int c = 0; c < chunks; c++) {
    const Vec x = load(scores + c * W) * scale, size = x > 0 ? x : -x, square = x * x;
    const Vec e = exp2(size * (-2 * LOG2E)), most = (1.f - e) / (1.f + e);
    Vec series = 0.0218694886f - 0.00886323553f * square;
    series = (series * square - 0.0539682540f) * square + 0.133333333f;
    series = x + x * square * (series * square - 0.333333333f);
    store(scores + c * W, (size < 0.3f ? series : x > 0 ? most : -most) * cap);
  }
}

// The rows of one KV head are the queries of the first token's GQA group, then of the
// next token's, and so on. All rows use the same K and V, which are read once. An item is
// the work of one thread at a time: at most ROWS rows.
struct Item {
  int sequence, head, first_row, rows, first_tile, last_tile;
};

template <class T> struct Attention {
  using D = Dot<T>;
  static constexpr int P = D::P;
  const Layer& layer;
  const Step& step;
  const int64_t dim, value_dim, group;  // value_dim is the padded one
  alignas(64) Element<T> queries[ROWS * MAX_DIM], weights[ROWS * TILE];
  alignas(64) float scores[ROWS * TILE];
  std::vector<T> gathered;

  Attention(const Layer& layer, const Step& step)
      : layer(layer), step(step), dim(layer.head_dim), value_dim(layer.padded_value_dim),
        group(layer.heads / layer.kv_heads) {}

  int position(const Item& item, int row) {
    const int tokens = step.query_start[item.sequence + 1] - step.query_start[item.sequence];
    return step.context_lens[item.sequence] - tokens + (item.first_row + row) / group;
  }
  int64_t query_head(const Item& item, int row) { return item.head * group + (item.first_row + row) % group; }
  int64_t place(const Item& item, int row) {  // of the row among the heads of all tokens
    const int64_t token = step.query_start[item.sequence] + (item.first_row + row) / group;
    return token * layer.heads + query_head(item, row);
  }
  // A vector may reach into the next row, which is written later.
  void load_queries(const Item& item, const T* q) {
    for (int r = 0; r < item.rows; r++)
      for (int d = 0; d < dim; d += W) store(queries + r * dim + d, load(q + place(item, r) * dim + d, dim - d));
  }
  // A sink is one score more in the sum. It is added here, once, however the tiles were merged.
  void finish(const Item& item, const State& state, const T* sinks, T* out) {
    const int64_t size = layer.value_dim;
    for (int r = 0; r < item.rows; r++) {
      float total = state.sum[r];
      if (sinks) total += std::exp2(load(sinks + query_head(item, r), 1)[0] * LOG2E - state.max[r]);
      T* to = out + place(item, r) * size;
      for (int64_t d = 0; d < size; d += W) store(to + d, load(state.out + r * value_dim + d) / total, size - d);
    }
  }

  // Attention of all rows of the item to the keys of one tile.
  void tile(const Item& item, int tile, State& state) {
    const int first = tile * TILE, keys = std::min(TILE, position(item, item.rows - 1) + 1 - first);
    const int chunks = (keys + W - 1) / W;
    // The hardware does not prefetch across pages, because they lie anywhere. So V is
    // fetched while K is used, and K of the next tile while V is used.
    const T *k[TILE / W], *v[TILE / W], *next_k[TILE / W];
    const int64_t k_stride = find_pages(item, first, keys, k, v, next_k);

    for_rows<BLOCK>(item.rows, [&](int r, auto m) {
      for_vectors(chunks, [&](int c, auto n) {
        Vec sums[m()][n()] = {};
        const Element<T>* a = queries + r * dim;
        for (int d = 0; d < dim; d += P)
          multiply<T>(
              sums, [&](int i) { return D::splat(a + i * dim + d); },
              [&](int j) {
                __builtin_prefetch(v[c + j] + d * W);
                return D::load_in(k[c + j] + d / P * k_stride);
              });
        for (int i = 0; i < m; i++)
          for (int j = 0; j < n; j++) store(scores + (r + i) * TILE + (c + j) * W, sums[i][j]);
      });
    });

    const float factor = layer.softcap ? 1 : layer.scale * LOG2E;
    for (int r = 0; r < item.rows; r++) {
      if (layer.softcap) cap_scores(scores + r * TILE, chunks, layer.scale / layer.softcap, layer.softcap * LOG2E);
      // The row sees the keys begin..end of the tile.
      const int end = position(item, r) + 1 - first, begin = layer.window ? end - layer.window : 0;
      Vec top = Vec{} - INFINITY, total = {};
      for (int c = 0; c < chunks; c++) {
        Vec x = load(scores + r * TILE + c * W) * factor;
        if (c * W < begin || (c + 1) * W > end)
          x = (lanes() >= begin - c * W) & (lanes() < end - c * W) ? x : Vec{} - INFINITY;
        store(scores + r * TILE + c * W, x);
        top = max(top, x);
      }
      state.max[r] = max(top);
      const float base = state.max[r] == -INFINITY ? 0 : state.max[r];
      for (int c = 0; c < chunks; c++) {
        const Vec p = exp2(load(scores + r * TILE + c * W) - base);
        store(weights + r * TILE + c * W, p);
        total += p;
      }
      state.sum[r] = sum(total);
    }

    for_rows<BLOCK>(item.rows, [&](int r, auto m) {
      for_vectors(value_dim / W, [&](int d, auto n) {
        Vec sums[m()][n()] = {};
        for (int c = 0; c < chunks; c++) {
          const int here = std::min(W, keys - c * W), pairs = here - here % P;
          const Element<T>* a = weights + r * TILE + c * W;
          const T* b = v[c] + d * W * P;
          for (int t = 0; t < pairs; t += P)
            multiply<T>(
                sums, [&](int i) { return D::splat(a + i * TILE + t); },
                [&](int j) {
                  __builtin_prefetch(next_k[c] + t * value_dim + (d + j) * W * P);
                  return D::load_in(b + t * value_dim + j * W * P);
                });
          // The second key of the last pair may lie past the context. Its weight is 0,
          // but the page may hold infinity there.
          if (pairs < here)
            multiply<T>(
                sums, [&](int i) { return D::splat(a + i * TILE + pairs); },
                [&](int j) { return D::first_of_pair(D::load_in(b + pairs * value_dim + j * W * P)); });
        }
        for (int i = 0; i < m; i++)
          for (int j = 0; j < n; j++) store(state.out + (r + i) * value_dim + (d + j) * W, sums[i][j]);
      });
    });
  }

  // Finds where each W tokens of a tile lie, and returns the stride of K there. Tokens of
  // blocks that are no multiple of W are copied together first.
  int64_t find_pages(const Item& item, int first, int keys, const T** k, const T** v, const T** next_k) {
    const int32_t* table = step.tables + item.sequence * step.table_stride;
    const int block = layer.block, last = position(item, item.rows - 1);
    if (block % W == 0) {
      for (int c = 0; c * W < keys; c++) {
        const int key = first + c * W, at = key % block, next = std::min(key + TILE, last);
        const T* p = page<T>(layer, table[key / block], item.head);
        k[c] = p + at * P;
        v[c] = p + block * dim + at * value_dim;
        next_k[c] = page<T>(layer, table[next / block], item.head) + next % block / W * W * P;
      }
      return block * P;
    }
    gathered.resize(TILE * (dim + value_dim));
    for (int i = 0; i < keys; i++) {
      const int key = first + i, at = key % block, to = i % W;
      const T* from_k = page<T>(layer, table[key / block], item.head);
      const T* from_v = from_k + block * dim + (at - at % P) * value_dim + at % P;
      T *to_k = &gathered[i / W * W * dim], *to_v = &gathered[TILE * dim + i / W * W * value_dim];
      k[i / W] = next_k[i / W] = to_k;
      v[i / W] = to_v;
      for (int d = 0; d < dim; d += P) std::memcpy(to_k + d * W + to * P, from_k + d * block + at * P, P * sizeof(T));
      for (int d = 0; d < value_dim; d++) to_v[(to - to % P) * value_dim + d * P + to % P] = from_v[d * P];
    }
    return W * P;
  }
};

// sinks [heads], or null
template <class T> void attend(const Layer& layer, const Step& step, const T* q, T* out, const T* sinks) {
  const int64_t group = layer.heads / layer.kv_heads;
  std::vector<Item> items;
  int64_t work = 0, tiles = 0;
  for (int s = 0; s < step.sequences; s++) {
    const int rows = (step.query_start[s + 1] - step.query_start[s]) * group, past = step.context_lens[s] - rows / group;
    for (int h = 0; h < layer.kv_heads; h++)
      for (int row = 0; row < rows; row += ROWS) {
        const int end = std::min(rows, row + ROWS), to = past + (end - 1) / group + 1;
        const int64_t from = layer.window ? std::max<int64_t>(0, past + row / group + 1 - layer.window) : 0;
        items.push_back({s, h, row, end - row, int(from / TILE), (to - 1) / TILE + 1});
        tiles += items.back().last_tile - items.back().first_tile;
        work += (to - from) * layer.head_dim;
      }
  }
  // With few items of many tiles (for example one sequence), threads share the tiles.
  // They merge them in the same order.
  const bool split = items.size() < 4u * omp_get_max_threads() && tiles > (int64_t)items.size();
  std::vector<std::pair<const Item*, int>> parts;
  for (const Item& item : items)
    for (int t = item.first_tile; split && t < item.last_tile; t++) parts.push_back({&item, t});
  std::unique_ptr<State[]> states(new State[parts.size()]);

#pragma omp parallel if (work > PARALLEL)
  {
    Attention<T> attention(layer, step);
    State state, next;
#pragma omp for schedule(dynamic) nowait
    for (size_t i = 0; i < (split ? 0 : items.size()); i++) {
      const Item& item = items[i];
      attention.load_queries(item, q);
      attention.tile(item, item.first_tile, state);
      for (int t = item.first_tile + 1; t < item.last_tile; t++) {
        attention.tile(item, t, next);
        state.merge(next, item.rows, layer.padded_value_dim);
      }
      attention.finish(item, state, sinks, out);
    }
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < parts.size(); i++) {
      attention.load_queries(*parts[i].first, q);
      attention.tile(*parts[i].first, parts[i].second, states[i]);
    }
#pragma omp for
    for (size_t i = 0; i < parts.size(); i++) {
      const Item& item = *parts[i].first;
      if (parts[i].second != item.first_tile) continue;
      for (int t = 1; t < item.last_tile - item.first_tile; t++)
        states[i].merge(states[i + t], item.rows, layer.padded_value_dim);
      attention.finish(item, states[i], sinks, out);
    }
  }
}

// ----------------------------------------------------------------------- matrix products

// x [rows, depth] @ w [cols, depth].T. Columns of w in panels lie as [cols / PANEL][depth
// / P][PANEL][P]. A panel is read from one end to the other, and is multiplied by all
// rows of a block in registers. The last columns, too few for a panel, lie as in
// checkpoints.
constexpr int PANEL = 2 * W, PANEL_ROWS = W == 16 ? 11 : 6;

// M rows times one panel of numbers of type B: T, or float for T's that were converted.
// It is not inlined, because with the variables of its caller the row pointers do not fit
// the registers.
template <class T, class B, int M>
__attribute__((noinline)) void times_panel(const Element<B>* x, int64_t stride, const B* panel, int64_t depth, const T* bias,
                                           int64_t bias_stride, T* out, int64_t out_stride) {
  using D = Dot<B>;
  Vec sums[M][2] = {};
  for (int64_t d = 0; d < depth; d += D::P)
    multiply<B>(
        sums, [&](int i) { return D::splat(x + i * stride + d); },
        [&](int j) {
          const B* at = panel + d * PANEL + j * W * D::P;
          __builtin_prefetch((const char*)at + AHEAD, 0, 2);
          return D::load_in(at);
        });
  for (int i = 0; i < M; i++)
    for (int j = 0; j < 2; j++)
      store(out + i * out_stride + j * W, bias ? sums[i][j] + load(bias + i * bias_stride + j * W) : sums[i][j]);
}

// x [rows, depth] times one column of w that lies as in checkpoints.
template <class T>
void times_row(const T* x, int64_t x_stride, const T* w, const T* bias, int64_t bias_stride, T* out, int64_t out_stride,
               int64_t rows, int64_t depth) {
  using D = Dot<T>;
  // Each span is summed on its own, because shorter sums have smaller rounding errors.
  constexpr int STEP = W * D::P, SPAN = 1024;
  for_rows<FEW_ROWS>(rows, [&](int64_t first, auto m) {
    const T* c = x + first * x_stride;
    float total[m()] = {};
    for (int64_t d = 0; d < depth;) {
      Vec sums[m()][1] = {};
      for (const int64_t end = std::min(depth, d + SPAN) - STEP; d <= end; d += STEP)
        multiply<T>(
            sums, [&](int i) { return D::load_in(c + i * x_stride + d); }, [&](int) { return D::load_in(w + d); });
      if (depth - d < STEP) {
        const auto rest = [&](const T* p) {
          T padded[STEP] = {};
          std::copy(p + d, p + depth, padded);
          return D::load_in(padded);
        };
        multiply<T>(
            sums, [&](int i) { return rest(c + i * x_stride); }, [&](int) { return rest(w); });
        d = depth;
      }
      for (int i = 0; i < m; i++) total[i] += sum(sums[i][0]);
    }
    for (int i = 0; i < m; i++) {
      const float start = bias ? load(bias + (first + i) * bias_stride, 1)[0] : 0;
      store(out + (first + i) * out_stride, Vec{} + (total[i] + start), 1);
    }
  });
}

// The first `panels` * PANEL columns of w lie in panels. The biases of a row lie
// `bias_stride` after those of the row before: 0 is one bias for all rows, and a bias at
// `out` is added to.
template <class T>
void product(const T* x, int64_t x_stride, const T* w, int64_t panels, const T* bias, int64_t bias_stride, T* out,
             int64_t out_stride, int64_t rows, int64_t cols, int64_t depth) {
  constexpr int STEP = W * Dot<T>::P;
  const int64_t blocks = (rows + PANEL_ROWS - 1) / PANEL_ROWS;
  // Many rows whose stride is a power of two would share few places in the cache. The rows
  // are therefore copied with a stride that is a vector longer.
  constexpr bool same = std::is_same_v<T, Element<T>>;
  const bool copied = panels && (!same || rows > FEW_ROWS);
  const int64_t stride = copied ? (depth + W - 1) / W * W + STEP : x_stride;
  const std::unique_ptr<Element<T>[]> copy(copied ? new Element<T>[rows * stride] : nullptr);
  const bool widened = !same && blocks > 2;  // converts each panel to floats once, not once a block
#pragma omp parallel if (cols * depth * ((rows + 7) / 8) > PARALLEL)
  {
    const Element<T>* all = copy.get();
    if constexpr (same)
      if (!copied) all = x;
    if (copied) {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < rows; r++)
        for (int64_t d = 0; d < depth; d += W) store(&copy[r * stride + d], load(x + r * x_stride + d, depth - d));
    }
    const std::unique_ptr<float[]> wide(widened ? new float[PANEL * depth] : nullptr);
    int64_t wide_panel = -1;
#pragma omp for schedule(static) nowait
    for (int64_t unit = 0; unit < panels * blocks; unit++) {
      const int64_t panel = unit / blocks, col = panel * PANEL;
      const T *from = w + col * depth, *panel_bias = bias ? bias + col : nullptr;
      if (widened && panel != wide_panel)
        for (int64_t i = 0; i < PANEL * depth; i += W) store(&wide[i], load(from + i));
      wide_panel = panel;
      for_block<PANEL_ROWS>(rows, unit % blocks, [&](int64_t first, auto m) {
        T* to = out + first * out_stride + col;
        const T* row_bias = panel_bias ? panel_bias + first * bias_stride : nullptr;
        const Element<T>* of = all + first * stride;
        if constexpr (!same)
          if (widened)
            return times_panel<T, float, m()>(of, stride, wide.get(), depth, row_bias, bias_stride, to, out_stride);
        times_panel<T, T, m()>(of, stride, from, depth, row_bias, bias_stride, to, out_stride);
      });
    }
#pragma omp for schedule(static) nowait
    for (int64_t col = panels * PANEL; col < cols; col++)
      times_row(x, x_stride, w + col * depth, bias ? bias + col : nullptr, bias_stride, out + col, out_stride, rows, depth);
  }
}

template <class T>
void linear(const T* x, int64_t x_stride, const T* w, const T* bias, T* out, int64_t rows, int64_t cols, int64_t depth) {
  product(x, x_stride, w, 0, bias, 0, out, cols, rows, cols, depth);
}
template <class T>
void linear_panels(const T* x, int64_t x_stride, const T* w, const T* bias, T* out, int64_t rows, int64_t cols, int64_t depth) {
  product(x, x_stride, w, cols / PANEL, bias, 0, out, cols, rows, cols, depth);
}
// out += x @ w.T
template <class T>
void add_linear_panels(const T* x, int64_t x_stride, const T* w, T* out, int64_t out_stride, int64_t rows, int64_t cols,
                       int64_t depth) {
  product(x, x_stride, w, cols / PANEL, (const T*)out, out_stride, out, out_stride, rows, cols, depth);
}

// A matrix w [cols, depth] for each of `groups`, one below the other, each with its own
// panels. The rows of group g are offsets[g] .. offsets[g + 1] - 1, and rows after the last
// group become 0. Threads share the panels of all groups that have rows, and no other panel
// is read.
template <class T>
void grouped_panels(const T* x, const T* w, const T* bias, T* out, const int32_t* offsets, int64_t groups, int64_t rows,
                    int64_t cols, int64_t depth) {
  constexpr int STEP = W * Dot<T>::P;
  constexpr bool same = std::is_same_v<T, Element<T>>;
  const int64_t panels = cols / PANEL, units = panels + cols % PANEL, used = offsets[groups];
  int64_t most = 0;
  for (int64_t g = 0; g < groups; g++) most = std::max<int64_t>(most, offsets[g + 1] - offsets[g]);
  const bool copied = panels && (!same || most > FEW_ROWS);  // see `product`
  const int64_t stride = copied ? (depth + W - 1) / W * W + STEP : depth;
  const std::unique_ptr<Element<T>[]> copy(copied ? new Element<T>[used * stride] : nullptr);
  const bool can_widen = !same && most > 2 * PANEL_ROWS;
#pragma omp parallel if (used * cols * depth > PARALLEL)
  {
    const Element<T>* all = copy.get();
    if constexpr (same)
      if (!copied) all = x;
    if (copied) {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < used; r++)
        for (int64_t d = 0; d < depth; d += W) store(&copy[r * stride + d], load(x + r * depth + d, depth - d));
    }
#pragma omp for schedule(static) nowait
    for (int64_t r = used; r < rows; r++) std::fill_n(out + r * cols, cols, T{});
    const std::unique_ptr<float[]> wide(can_widen ? new float[PANEL * depth] : nullptr);
    for_share(offsets, groups, units, [&](int64_t group, int64_t first_unit, int64_t last_unit) {
      const int64_t first_row = offsets[group], count = offsets[group + 1] - first_row;
      const bool widened = !same && count > 2 * PANEL_ROWS;
      const T *matrix = w + group * cols * depth, *group_bias = bias ? bias + group * cols : nullptr;
      for (int64_t unit = first_unit; unit < last_unit; unit++) {
        if (unit >= panels) {
          const int64_t col = panels * PANEL + unit - panels;
          times_row(x + first_row * depth, depth, matrix + col * depth, group_bias ? group_bias + col : nullptr, 0,
                    out + first_row * cols + col, cols, count, depth);
          continue;
        }
        const int64_t col = unit * PANEL;
        const T *from = matrix + col * depth, *panel_bias = group_bias ? group_bias + col : nullptr;
        if (widened)
          for (int64_t i = 0; i < PANEL * depth; i += W) store(&wide[i], load(from + i));
        for_rows<PANEL_ROWS>(count, [&](int64_t first, auto m) {
          T* to = out + (first_row + first) * cols + col;
          const Element<T>* of = all + (first_row + first) * stride;
          if constexpr (!same)
            if (widened) return times_panel<T, float, m()>(of, stride, wide.get(), depth, panel_bias, 0, to, cols);
          times_panel<T, T, m()>(of, stride, from, depth, panel_bias, 0, to, cols);
        });
      }
    });
  }
}

// Rows `ids` of w [rows, depth]. An id outside w gives zeros, so the kernel reads only w.
template <class T> void embed(const int64_t* ids, const T* w, T* out, int64_t count, int64_t rows, int64_t depth) {
  for (int64_t i = 0; i < count; i++)
    if (ids[i] >= 0 && ids[i] < rows) std::copy_n(w + ids[i] * depth, depth, out + i * depth);
    else std::fill_n(out + i * depth, depth, T{});
}
template <class T> void embed_panels(const int64_t* ids, const T* w, T* out, int64_t count, int64_t rows, int64_t depth) {
  constexpr int P = Dot<T>::P;
#pragma omp parallel for schedule(static) if (count * depth > PARALLEL)
  for (int64_t i = 0; i < count; i++) {
    const int64_t id = ids[i], lane = id % PANEL;
    T* to = out + i * depth;
    if (id < 0 || id >= rows / PANEL * PANEL) {
      embed(&id, w, to, 1, rows, depth);
      continue;
    }
    const T* from = w + (id - lane) * depth + lane * P;
    for (int64_t d = 0; d < depth; d += P) std::copy_n(from + d * PANEL, P, to + d);
  }
}

// Transposes each of `panels` matrices [rows, cols] in place.
template <class U> void transpose(U* panel, int64_t panels, int64_t rows, int64_t cols) {
#pragma omp parallel
  {
    const std::unique_ptr<U[]> copy(new U[rows * cols]);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < panels; i++) {
      U* to = panel + i * rows * cols;
      std::copy(to, to + rows * cols, copy.get());
      for (int64_t c = 0; c < cols; c++)
        for (int64_t r = 0; r < rows; r++) to[c * rows + r] = copy[r * cols + c];
    }
  }
}

// ------------------------------------------------------------------ norms and activation

// offset: is added to every weight. round_once: see `quotient`.
template <class T>
void norm_row(T* out, const T* x, const T* weight, float eps, float offset, bool round_once, int64_t size) {
  Vec squares = {};
  for (int64_t i = 0; i < size; i += W) {
    const Vec v = load(x + i, size - i);
    squares += v * v;
  }
  const float scale = 1 / std::sqrt(sum(squares) / size + eps);
  for (int64_t i = 0; i < size; i += W)
    store(out + i, quotient<T>(load(x + i, size - i) * scale, round_once) * (load(weight + i, size - i) + offset),
          size - i);
}

template <class T>
void rms_norm(const T* x, int64_t x_stride, const T* weight, float eps, float offset, int64_t round_once, T* out,
              int64_t rows, int64_t size) {
#pragma omp parallel for schedule(static) if (rows * size > PARALLEL)
  for (int64_t r = 0; r < rows; r++) norm_row(out + r * size, x + r * x_stride, weight, eps, offset, round_once, size);
}

// Rows of x may be parts of longer rows.
template <class T>
void rms_norm_in_place(T* x, int64_t x_stride, const T* weight, float eps, int64_t round_once, int64_t rows,
                       int64_t size) {
#pragma omp parallel for schedule(static) if (rows * size > PARALLEL)
  for (int64_t r = 0; r < rows; r++) norm_row(x + r * x_stride, x + r * x_stride, weight, eps, 0, round_once, size);
}

// residual += x, then x = norm(residual).
template <class T>
void add_rms_norm(T* x, T* residual, const T* weight, float eps, float offset, int64_t round_once, int64_t rows,
                  int64_t size) {
#pragma omp parallel for schedule(static) if (rows * size > PARALLEL)
  for (int64_t r = 0; r < rows; r++) {
    T *a = x + r * size, *b = residual + r * size;
    for (int64_t i = 0; i < size; i += W) store(b + i, load(a + i, size - i) + load(b + i, size - i), size - i);
    norm_row(a, b, weight, eps, offset, round_once, size);
  }
}

INLINE Vec sigmoid(Vec x) {
  const Vec e = exp2((x > 0 ? -x : x) * LOG2E);  // of -|x|, which cannot overflow
  return (x > 0 ? Vec{} + 1.f : e) / (1.f + e);
}

// activation(first half of a row) * second half
template <class T, class F>
INLINE void gate(const T* x, int64_t x_stride, T* out, int64_t rows, int64_t size, F activation) {
#pragma omp parallel for schedule(static) if (rows * size > PARALLEL)
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < size; i += W) {
      const T* gates = x + r * x_stride + i;
      const Vec gate = load(gates, size - i), up = load(gates + size, size - i);
      store(out + r * size + i, activation(gate) * up, size - i);
    }
}
template <class T> void silu_and_mul(const T* x, int64_t x_stride, T* out, int64_t rows, int64_t size) {
  gate(x, x_stride, out, rows, size, [](Vec x) { return x * sigmoid(x); });
}
// x / 2 * (1 + tanh(y)) = x * sigmoid(2 y), where y = sqrt(2 / pi) * (x + 0.044715 x^3)
template <class T> void gelu_and_mul(const T* x, int64_t x_stride, T* out, int64_t rows, int64_t size) {
  gate(x, x_stride, out, rows, size, [](Vec x) { return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x)); });
}

// x += y
template <class T> void add(T* x, const T* y, int64_t count) {
#pragma omp parallel for schedule(static) if (count > PARALLEL)
  for (int64_t i = 0; i < count; i += W) store(x + i, load(x + i, count - i) + load(y + i, count - i), count - i);
}
// x *= factor
template <class T> void scale(T* x, float factor, int64_t count) {
#pragma omp parallel for schedule(static) if (count > PARALLEL)
  for (int64_t i = 0; i < count; i += W) store(x + i, load(x + i, count - i) * factor, count - i);
}

// ------------------------------------------------------------------------------ sampling

// Inverse CDF in the order of the vocabulary: the first id at which the cumulative sum of
// exp((logit - max) / temperature) exceeds `uniform` times the total. Logits are read
// once, span by span. Then only the span of the drawn token is read again.
template <class T>
void sample(const T* logits, int64_t stride, const float* temperature, const float* uniform, int64_t* tokens, int64_t rows,
            int64_t vocab) {
  constexpr int64_t SPAN = 1024;
  const int64_t spans = (vocab + SPAN - 1) / SPAN;
  std::unique_ptr<float[]> tops(new float[rows * spans]), sums(new float[rows * spans]);
  // W logits, -inf past the end. NaN counts as -inf, and infinity as the largest finite
  // number.
  const auto at = [&](int64_t row, int64_t id) {
    Vec x = load(logits + row * stride + id, vocab - id);
    x = x == x ? x : Vec{} - INFINITY;
    x = x < FLT_MAX ? x : Vec{} + FLT_MAX;
    return vocab - id >= W ? x : lanes() < int(vocab - id) ? x : Vec{} - INFINITY;
  };

#pragma omp parallel if (rows * vocab > PARALLEL)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows * spans; i++) {
      const int64_t row = i / spans, begin = i % spans * SPAN, end = std::min(vocab, begin + SPAN);
      Vec top = Vec{} - INFINITY, total = {};
      for (int64_t id = begin; id < end; id += W) top = max(top, at(row, id));
      tops[i] = max(top);
      if (temperature[row] == 0 || tops[i] == -INFINITY) continue;
      for (int64_t id = begin; id < end; id += W) total += exp2((at(row, id) - tops[i]) * (LOG2E / temperature[row]));
      sums[i] = sum(total);
    }

#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
      const float *top = &tops[row * spans], best = *std::max_element(top, top + spans);
      const bool greedy = temperature[row] == 0;
      const float scale = LOG2E / temperature[row];
      tokens[row] = 0;  // the result if nothing can be drawn
      int64_t span = std::find(top, top + spans, best) - top;
      double seen = 0, target = 0;
      if (!greedy) {
        const auto prob_sum = [&](int64_t s) {
          const float power = (top[s] - best) * scale;  // NaN where both are -inf
          // 0 below 2^-126, like exp2 of vectors.
          return power > -126 ? (double)sums[row * spans + s] * std::exp2(power) : 0.;
        };
        for (int64_t s = 0; s < spans; s++) target += prob_sum(s);
        target *= uniform[row];
        for (span = 0; span < spans - 1 && seen + prob_sum(span) <= target; span++) seen += prob_sum(span);
      }
      bool found = false;
      for (int64_t id = span * SPAN; id < std::min(vocab, (span + 1) * SPAN) && !found; id += W) {
        const Vec x = at(row, id), p = greedy ? Vec{} : exp2((x - best) * scale);
        for (int i = 0; i < W && !found; i++) {
          if (greedy ? x[i] == best : p[i] > 0) tokens[row] = id + i;
          seen += p[i];
          found = greedy ? x[i] == best : seen > target;
        }
      }
    }
  }
}

}  // namespace

#define EXPORT(T)                                                                               \
  extern "C" int64_t panel_depth_##T() { return Dot<T>::P; }                                    \
  extern "C" void embed_##T(const Arg* args) { apply(embed<T>, args); }                         \
  extern "C" void embed_panels_##T(const Arg* args) { apply(embed_panels<T>, args); }           \
  extern "C" void write_##T(const Arg* args) { apply(write<T>, args); }                         \
  extern "C" void store_##T(const Arg* args) { apply(store_heads<T>, args); }                   \
  extern "C" void attend_##T(const Arg* args) { apply(attend<T>, args); }                       \
  extern "C" void linear_##T(const Arg* args) { apply(linear<T>, args); }                       \
  extern "C" void linear_panels_##T(const Arg* args) { apply(linear_panels<T>, args); }         \
  extern "C" void add_linear_panels_##T(const Arg* args) { apply(add_linear_panels<T>, args); } \
  extern "C" void grouped_panels_##T(const Arg* args) { apply(grouped_panels<T>, args); }       \
  extern "C" void rms_norm_##T(const Arg* args) { apply(rms_norm<T>, args); }                   \
  extern "C" void rms_norm_in_place_##T(const Arg* args) { apply(rms_norm_in_place<T>, args); } \
  extern "C" void add_rms_norm_##T(const Arg* args) { apply(add_rms_norm<T>, args); }           \
  extern "C" void silu_and_mul_##T(const Arg* args) { apply(silu_and_mul<T>, args); }           \
  extern "C" void gelu_and_mul_##T(const Arg* args) { apply(gelu_and_mul<T>, args); }           \
  extern "C" void add_##T(const Arg* args) { apply(add<T>, args); }                             \
  extern "C" void scale_##T(const Arg* args) { apply(scale<T>, args); }                         \
  extern "C" void sample_##T(const Arg* args) { apply(sample<T>, args); }
EXPORT(bf16)
EXPORT(fp16)
EXPORT(fp32)

extern "C" void replay(const Call* calls, int64_t count) {
  for (int64_t i = 0; i < count; i++) calls[i].kernel(calls[i].args);
}
extern "C" int64_t panel_columns() { return PANEL; }
extern "C" void transpose_16(uint16_t* panel, int64_t panels, int64_t rows, int64_t cols) { transpose(panel, panels, rows, cols); }
extern "C" void transpose_32(uint32_t* panel, int64_t panels, int64_t rows, int64_t cols) { transpose(panel, panels, rows, cols); }
