// Each cell on one vector of units: its step, its local gradient and the diagonal of its Jacobian.
#pragma once

#include "simd.h"
#include "steps.h"

namespace statefeed {

// One row (step, batch element) at one vector of units, `count` lanes of which are inside.
template <class T>
struct ForwardRow {
  T *gates, *extra, *y, *c;
  const T *previous, *bias, *sum;
  int64_t hidden, unit;
  int count;

  Vector<T> gate(int g) const { return load(gates + g * hidden + unit, count); }
  void keep(int g, Vector<T> value) const { store(gates + g * hidden + unit, value, count); }
};

template <class T>
struct ReverseRow {
  const T *gates, *extra, *y, *previous, *previous_c, *e, *diagonal, *residual;
  T *next_residual, *carry, *d, *d_hidden, *sums;
  Diagonal rule;
  int64_t hidden, unit;
  int count;

  Vector<T> at(const T* row, int part = 0) const { return load(row + part * hidden + unit, count); }
  void put(T* row, int part, Vector<T> value) const { store(row + part * hidden + unit, value, count); }
  void local(int part, Vector<T> value) const {
    put(d, part, value);
    put(sums, part, at(sums, part) + value);
  }
  // carry = D * delta + residual; the next pass's residual starts as (direct - D) * delta.
  void pass_on(int part, Vector<T> factor, Vector<T> direct, Vector<T> delta) const {
    Vector<T> below = factor * delta;
    if (residual) below += at(residual, part);
    if (next_residual) put(next_residual, part, (direct - factor) * delta);
    put(carry, part, below);
  }
};

template <class T>
struct Gru {
  static constexpr int gates = 3, states = 1, unit_vectors = 1, split = 2, sums = 4;

  static void step(const ForwardRow<T>& row) {
    constexpr int L = lanes<T>;
    const T one = 1;
    const Vector<T> r = sigmoid<T>(row.gate(0) + load(row.sum)), z = sigmoid<T>(row.gate(1) + load(row.sum + L));
    Vector<T> q = load(row.sum + 2 * L);
    if (row.bias) q += load(row.bias + row.unit, row.count);
    const Vector<T> n = tanh<T>(row.gate(2) + r * q), h = load(row.previous + row.unit, row.count);
    store(row.y + row.unit, z * h + (one - z) * n, row.count);
    if (!row.extra) return;
    row.keep(0, r), row.keep(1, z), row.keep(2, n);
    store(row.extra + row.unit, q, row.count);
  }

  struct Local {
    Vector<T> r, z, n, q, h, dz, dn;  // dz, dn: derivatives of h[t] by the pre-activations
  };
  static Local local(const ReverseRow<T>& row) {
    const T one = 1;
    Local l{row.at(row.gates, 0), row.at(row.gates, 1), row.at(row.gates, 2), row.at(row.extra), row.at(row.previous), {}, {}};
    l.dz = (l.h - l.n) * l.z * (one - l.z);
    l.dn = (one - l.z) * (one - l.n * l.n);
    return l;
  }
  static Vector<T> jacobian(const ReverseRow<T>& row, const Local& l, const T* w, int) {
    const T one = 1;
    return l.z + l.dz * row.at(w, 1) + l.dn * l.r * (row.at(w, 2) + l.q * (one - l.r) * row.at(w, 0));
  }
  static void reverse(const ReverseRow<T>& row) {
    const T one = 1;
    const Local l = local(row);
    const Vector<T> delta = row.at(row.e) + row.at(row.carry), n = delta * l.dn, q = n * l.r;
    row.local(0, q * l.q * (one - l.r));
    row.local(1, delta * l.dz);
    row.local(2, n);
    row.put(row.d_hidden, 0, q);
    row.put(row.sums, 3, row.at(row.sums, 3) + q);
    Vector<T> factor = l.z;
    if (row.rule == Diagonal::stationary) factor = row.at(row.diagonal);
    if (row.rule == Diagonal::jacobian) factor = jacobian(row, l, row.diagonal, 0);
    row.pass_on(0, factor, l.z, delta);
  }
};

template <class T>
struct Lstm {
  static constexpr int gates = 4, states = 2, unit_vectors = 1, split = 4, sums = 4;

  static void step(const ForwardRow<T>& row) {
    constexpr int L = lanes<T>;
    const Vector<T> i = sigmoid<T>(row.gate(0) + load(row.sum)), f = sigmoid<T>(row.gate(1) + load(row.sum + L)),
                    g = tanh<T>(row.gate(2) + load(row.sum + 2 * L)), o = sigmoid<T>(row.gate(3) + load(row.sum + 3 * L)),
                    c = f * load(row.c + row.unit, row.count) + i * g;
    store(row.c + row.unit, c, row.count);
    store(row.y + row.unit, o * tanh<T>(c), row.count);
    if (!row.extra) return;
    row.keep(0, i), row.keep(1, f), row.keep(2, g), row.keep(3, o);
    store(row.extra + row.unit, c, row.count);
  }

  struct Local {
    Vector<T> i, f, g, o, c, tanh_c, di, df, dg, dout, dc;  // di, df, dg: of c[t]; dout, dc: of h[t]
  };
  static Local local(const ReverseRow<T>& row) {
    const T one = 1;
    Local l{row.at(row.gates, 0), row.at(row.gates, 1), row.at(row.gates, 2), row.at(row.gates, 3), row.at(row.previous_c),
            {}, {}, {}, {}, {}, {}};
    l.tanh_c = tanh<T>(row.at(row.extra));
    l.di = l.g * l.i * (one - l.i);
    l.df = l.c * l.f * (one - l.f);
    l.dg = l.i * (one - l.g * l.g);
    l.dout = l.tanh_c * l.o * (one - l.o);
    l.dc = l.o * (one - l.tanh_c * l.tanh_c);
    return l;
  }
  static Vector<T> jacobian(const ReverseRow<T>& row, const Local& l, const T* w, int part) {
    if (part == 1) return l.f;
    return l.dc * (l.di * row.at(w, 0) + l.df * row.at(w, 1) + l.dg * row.at(w, 2)) + l.dout * row.at(w, 3);
  }
  static void reverse(const ReverseRow<T>& row) {
    const Local l = local(row);
    const Vector<T> delta = row.at(row.e) + row.at(row.carry, 0), gamma = row.at(row.carry, 1) + l.dc * delta;
    row.local(0, gamma * l.di);
    row.local(1, gamma * l.df);
    row.local(2, gamma * l.dg);
    row.local(3, delta * l.dout);
    Vector<T> factor{}, cell_factor = l.f;
    if (row.rule == Diagonal::stationary) factor = row.at(row.diagonal, 0), cell_factor = row.at(row.diagonal, 1);
    if (row.rule == Diagonal::jacobian) factor = jacobian(row, l, row.diagonal, 0);
    row.pass_on(0, factor, Vector<T>{}, delta);
    row.pass_on(1, cell_factor, l.f, gamma);
  }
};

template <class T, bool Relu>
struct Rnn {
  static constexpr int gates = 1, states = 1, unit_vectors = 2, split = 1, sums = 1;

  static void step(const ForwardRow<T>& row) {
    const Vector<T> x = row.gate(0) + load(row.sum);
    store(row.y + row.unit, Relu ? (x < Vector<T>{} ? Vector<T>{} : x) : tanh<T>(x), row.count);
  }

  struct Local {
    Vector<T> slope;
  };
  static Local local(const ReverseRow<T>& row) {
    const Vector<T> y = row.at(row.y);
    return {Relu ? (y > Vector<T>{} ? splat(T(1)) : Vector<T>{}) : T(1) - y * y};
  }
  static Vector<T> jacobian(const ReverseRow<T>& row, const Local& l, const T* w, int) { return l.slope * row.at(w); }
  static void reverse(const ReverseRow<T>& row) {
    const Local l = local(row);
    const Vector<T> delta = row.at(row.e) + row.at(row.carry);
    row.local(0, delta * l.slope);
    Vector<T> factor{};
    if (row.rule == Diagonal::stationary) factor = row.at(row.diagonal);
    if (row.rule == Diagonal::jacobian) factor = jacobian(row, l, row.diagonal, 0);
    row.pass_on(0, factor, Vector<T>{}, delta);
  }
};

}  // namespace statefeed
