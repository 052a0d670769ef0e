// The CPU's kernels for bf16, fp16 and fp32: attention over pages, matrix products, norms, sampling.
//
// It has plain pointers and no torch headers, so it builds fast on first use (cpu.py).
// Python calls it through ctypes. The result of a row depends on that row alone: tiles have
// fixed places and are added in a fixed order, for every batch and every number of threads.

#include "vectors.h"

namespace {

// ----------------------------------------------------------------------------- attention

constexpr int ROWS = 24, TILE = 128, MAX_DIM = 256;  // query rows and keys of a tile; largest head
// Rows with four vectors of sums each. AVX2 has 16 registers, AVX-512 and Arm have 32.
constexpr int BLOCK = W == 8 ? 2 : 6;

struct Layer {
  void* pages;  // [pages][kv_heads][K, V]
  int64_t heads, kv_heads, head_dim, block, window;
  float scale;
};
struct Step {  // AttentionMetadata
  const int32_t *positions, *slots, *query_start, *context_lens, *tables;
  int64_t table_stride, tokens, sequences;
};

// K of a page is [head_dim / P][block][P], and V is [block / P][head_dim][P]. Products
// run along tokens for K and along dimensions for V, so they need no sums across lanes.
// The P elements of one step of a dot product lie side by side.
template <class T> INLINE T* page(const Layer& layer, int64_t id, int64_t head) {
  return (T*)layer.pages + (id * layer.kv_heads + head) * 2 * layer.block * layer.head_dim;
}

template <class T> void norm_rope(const T* x, const T* weight, float eps, const float* cos_sin, int dim, T* out) {
  float y[MAX_DIM], z[MAX_DIM];
  Vec squares = {};
  for (int i = 0; i < dim; i += W) {
    store(y + i, load(x + i));
    squares += load(y + i) * load(y + i);
  }
  const float scale = weight ? 1 / std::sqrt(sum(squares) / dim + eps) : 1;
  for (int i = 0; weight && i < dim; i += W)
    store(y + i, rounded<T>(rounded<T>(load(y + i) * scale) * load(weight + i)));
  const int half = dim / 2;
  for (int i = 0; i < half; i++) {
    z[i] = y[i] * cos_sin[i] - y[i + half] * cos_sin[i + half];
    z[i + half] = y[i + half] * cos_sin[i] + y[i] * cos_sin[i + half];
  }
  for (int i = 0; i < dim; i += W) store(out + i, load(z + i));
}

template <class T>
void write(const Layer& layer, const Step& step, const T* qkv, int64_t heads, const float* cos_sin, const T* q_norm,
           const T* k_norm, float eps, T* q) {
  constexpr int P = Dot<T>::P;
  const int64_t dim = layer.head_dim, block = layer.block, kv_heads = layer.kv_heads, all = heads + 2 * kv_heads;
#pragma omp parallel for schedule(static) if (step.tokens * all * dim > PARALLEL)
  for (int64_t t = 0; t < step.tokens; t++) {
    // A key is spread over many cache lines, one for each P dimensions. The cache lines
    // of a token a little ahead are fetched meanwhile.
    if (const int64_t next = t + 2; next < step.tokens && step.slots[next] >= 0)
      for (int h = 0; h < kv_heads; h++) {
        const T* to = page<T>(layer, step.slots[next] / block, h);
        const int64_t at = step.slots[next] % block;
        for (int d = 0; d < dim; d += P) __builtin_prefetch(to + at * P + d * block, 1);
        const T* to_v = to + (block + at - at % P) * dim;
        for (int d = 0; d < dim * P; d += 64 / sizeof(T)) __builtin_prefetch(to_v + d, 1);
      }
    const T* x = qkv + t * all * dim;
    const float* angles = cos_sin ? cos_sin + step.positions[t] * dim : nullptr;
    for (int h = 0; h < heads; h++) norm_rope(x + h * dim, q_norm, eps, angles, dim, q + (t * heads + h) * dim);
    if (step.slots[t] < 0) continue;
    const int64_t id = step.slots[t] / block, at = step.slots[t] % block;
    for (int h = 0; h < kv_heads; h++) {
      T rotated[MAX_DIM];
      const T *k = x + (heads + h) * dim, *v = k + kv_heads * dim;
      if (angles) {
        norm_rope(k, k_norm, eps, angles, dim, rotated);
        k = rotated;
      }
      T *to_k = page<T>(layer, id, h) + at * P, *to_v = page<T>(layer, id, h) + (block + at - at % P) * dim + at % P;
      for (int d = 0; d < dim; d += P) std::memcpy(to_k + d * block, k + d, P * sizeof(T));
      for (int d = 0; d < dim; d++) to_v[d * P] = v[d];
    }
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
  const int64_t dim, group;
  alignas(64) Element<T> queries[ROWS * MAX_DIM], weights[ROWS * TILE];
  alignas(64) float scores[ROWS * TILE];
  std::vector<T> gathered;

  Attention(const Layer& layer, const Step& step)
      : layer(layer), step(step), dim(layer.head_dim), group(layer.heads / layer.kv_heads) {}

  int position(const Item& item, int row) {
    const int tokens = step.query_start[item.sequence + 1] - step.query_start[item.sequence];
    return step.context_lens[item.sequence] - tokens + (item.first_row + row) / group;
  }
  int64_t offset(const Item& item, int row) {  // of the row in q and in the output
    const int64_t r = item.first_row + row;
    return ((step.query_start[item.sequence] + r / group) * layer.heads + item.head * group + r % group) * dim;
  }
  void load_queries(const Item& item, const T* q) {
    for (int r = 0; r < item.rows; r++)
      for (int d = 0; d < dim; d += W) store(queries + r * dim + d, load(q + offset(item, r) + d));
  }
  void finish(const Item& item, const State& state, T* out) {
    for (int r = 0; r < item.rows; r++)
      for (int d = 0; d < dim; d += W) store(out + offset(item, r) + d, load(state.out + r * dim + d) / state.sum[r]);
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

    for (int r = 0; r < item.rows; r++) {
      // The row sees the keys begin..end of the tile.
      const int end = position(item, r) + 1 - first, begin = layer.window ? end - layer.window : 0;
      Vec top = Vec{} - INFINITY, total = {};
      for (int c = 0; c < chunks; c++) {
        Vec x = load(scores + r * TILE + c * W) * (layer.scale * LOG2E);
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
      for_vectors(dim / W, [&](int d, auto n) {
        Vec sums[m()][n()] = {};
        for (int c = 0; c < chunks; c++) {
          const int here = std::min(W, keys - c * W), pairs = here - here % P;
          const Element<T>* a = weights + r * TILE + c * W;
          const T* b = v[c] + d * W * P;
          for (int t = 0; t < pairs; t += P)
            multiply<T>(
                sums, [&](int i) { return D::splat(a + i * TILE + t); },
                [&](int j) {
                  __builtin_prefetch(next_k[c] + t * dim + (d + j) * W * P);
                  return D::load_in(b + t * dim + j * W * P);
                });
          // The second key of the last pair may lie past the context. Its weight is 0,
          // but the page may hold infinity there.
          if (pairs < here)
            multiply<T>(
                sums, [&](int i) { return D::splat(a + i * TILE + pairs); },
                [&](int j) { return D::first_of_pair(D::load_in(b + pairs * dim + j * W * P)); });
        }
        for (int i = 0; i < m; i++)
          for (int j = 0; j < n; j++) store(state.out + (r + i) * dim + (d + j) * W, sums[i][j]);
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
        v[c] = p + (block + at) * dim;
        next_k[c] = page<T>(layer, table[next / block], item.head) + next % block / W * W * P;
      }
      return block * P;
    }
    gathered.resize(2 * TILE * dim);
    for (int i = 0; i < keys; i++) {
      const int key = first + i, at = key % block, to = i % W;
      const T *from_k = page<T>(layer, table[key / block], item.head), *from_v = from_k + (block + at - at % P) * dim + at % P;
      T *to_k = &gathered[i / W * W * dim], *to_v = to_k + TILE * dim;
      k[i / W] = next_k[i / W] = to_k;
      v[i / W] = to_v;
      for (int d = 0; d < dim; d += P) std::memcpy(to_k + d * W + to * P, from_k + d * block + at * P, P * sizeof(T));
      for (int d = 0; d < dim; d++) to_v[(to - to % P) * dim + d * P + to % P] = from_v[d * P];
    }
    return W * P;
  }
};

template <class T> void attend(const Layer& layer, const Step& step, const T* q, T* out) {
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
        state.merge(next, item.rows, layer.head_dim);
      }
      attention.finish(item, state, out);
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
      for (int t = 1; t < item.last_tile - item.first_tile; t++) states[i].merge(states[i + t], item.rows, layer.head_dim);
      attention.finish(item, states[i], out);
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

// The first `panels` * PANEL columns of w lie in panels. The biases of a row lie
// `bias_stride` after those of the row before: 0 is one bias for all rows, and a bias at
// `out` is added to.
template <class T>
void product(const T* x, int64_t x_stride, const T* w, int64_t panels, const T* bias, int64_t bias_stride, T* out,
             int64_t out_stride, int64_t rows, int64_t cols, int64_t depth) {
  using D = Dot<T>;
  // Each span is summed on its own, because shorter sums have smaller rounding errors.
  constexpr int STEP = W * D::P, SPAN = 1024;
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
      for_rows<FEW_ROWS>(rows, [&](int64_t first, auto m) {
        const T *b = w + col * depth, *c = x + first * x_stride;
        float total[m()] = {};
        for (int64_t d = 0; d < depth;) {
          Vec sums[m()][1] = {};
          for (const int64_t end = std::min(depth, d + SPAN) - STEP; d <= end; d += STEP)
            multiply<T>(
                sums, [&](int i) { return D::load_in(c + i * x_stride + d); }, [&](int) { return D::load_in(b + d); });
          if (depth - d < STEP) {
            const auto rest = [&](const T* p) {
              T padded[STEP] = {};
              std::copy(p + d, p + depth, padded);
              return D::load_in(padded);
            };
            multiply<T>(
                sums, [&](int i) { return rest(c + i * x_stride); }, [&](int) { return rest(b); });
            d = depth;
          }
          for (int i = 0; i < m; i++) total[i] += sum(sums[i][0]);
        }
        for (int i = 0; i < m; i++) {
          const float start = bias ? load(bias + (first + i) * bias_stride + col, 1)[0] : 0;
          store(out + (first + i) * out_stride + col, Vec{} + (total[i] + start), 1);
        }
      });
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

template <class T> void norm_row(T* out, const T* x, const T* weight, float eps, int64_t size) {
  Vec squares = {};
  for (int64_t i = 0; i < size; i += W) {
    const Vec v = load(x + i, size - i);
    squares += v * v;
  }
  const float scale = 1 / std::sqrt(sum(squares) / size + eps);
  for (int64_t i = 0; i < size; i += W)
    store(out + i, rounded<T>(load(x + i, size - i) * scale) * load(weight + i, size - i), size - i);
}

template <class T>
void rms_norm(const T* x, int64_t x_stride, const T* weight, float eps, T* out, int64_t rows, int64_t size) {
#pragma omp parallel for schedule(static) if (rows * size > PARALLEL)
  for (int64_t r = 0; r < rows; r++) norm_row(out + r * size, x + r * x_stride, weight, eps, size);
}

// residual += x, then x = norm(residual).
template <class T> void add_rms_norm(T* x, T* residual, const T* weight, float eps, int64_t rows, int64_t size) {
#pragma omp parallel for schedule(static) if (rows * size > PARALLEL)
  for (int64_t r = 0; r < rows; r++) {
    T *a = x + r * size, *b = residual + r * size;
    for (int64_t i = 0; i < size; i += W) store(b + i, load(a + i, size - i) + load(b + i, size - i), size - i);
    norm_row(a, b, weight, eps, size);
  }
}

template <class T> void silu_and_mul(const T* x, int64_t x_stride, T* out, int64_t rows, int64_t size) {
#pragma omp parallel for schedule(static) if (rows * size > PARALLEL)
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < size; i += W) {
      const T* gates = x + r * x_stride + i;
      const Vec gate = load(gates, size - i), up = load(gates + size, size - i);
      const Vec e = exp2((gate > 0 ? -gate : gate) * LOG2E);  // of -|gate|, which cannot overflow
      store(out + r * size + i, gate * ((gate > 0 ? Vec{} + 1.f : e) / (1.f + e)) * up, size - i);
    }
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
  extern "C" void attend_##T(const Arg* args) { apply(attend<T>, args); }                       \
  extern "C" void linear_##T(const Arg* args) { apply(linear<T>, args); }                       \
  extern "C" void linear_panels_##T(const Arg* args) { apply(linear_panels<T>, args); }         \
  extern "C" void add_linear_panels_##T(const Arg* args) { apply(add_linear_panels<T>, args); } \
  extern "C" void rms_norm_##T(const Arg* args) { apply(rms_norm<T>, args); }                   \
  extern "C" void add_rms_norm_##T(const Arg* args) { apply(add_rms_norm<T>, args); }           \
  extern "C" void silu_and_mul_##T(const Arg* args) { apply(silu_and_mul<T>, args); }           \
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
