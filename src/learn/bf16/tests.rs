//! Both forms against f64 products of the rounded operands.

use half::bf16;

use super::*;

/// The forms that this machine can test.
fn forms() -> Vec<Form> {
    if tiles() { vec![Form::Plain, Form::best()] } else { vec![Form::Plain] }
}

fn lhs(form: Form, x: Matrix<'_>, threads: Threads) -> Lhs {
    let mut packed = Packed::empty(Side::Lhs, form);
    packed.fill(x, 1.0, threads);
    Lhs(packed)
}

fn rhs(form: Form, x: Matrix<'_>, threads: Threads) -> Rhs {
    let mut packed = Packed::empty(Side::Rhs, form);
    packed.fill(x.t(), 1.0, threads);
    Rhs(packed)
}

/// Numbers in -1..1 from a seed.
fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn get(x: Matrix<'_>, i: usize, j: usize) -> f64 {
    let (row, col) = x.strides();
    bf16::from_f32(x.data()[i * row + j * col]).to_f64()
}

/// The sum over k of rounded products, and of their sizes.
fn want(l: Matrix<'_>, r: Matrix<'_>, i: usize, j: usize) -> (f64, f64) {
    let products = (0..l.size().1).map(|k| get(l, i, k) * get(r, k, j));
    products.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()))
}

/// Checks `out` against the terms and what was to be added to them.
fn check(
    (out, stride): (&[f32], usize),
    terms: &[(Matrix<'_>, Matrix<'_>)],
    added: impl Fn(usize, usize) -> f64,
) {
    let (m, n) = (terms[0].0.size().0, terms[0].1.size().1);
    for i in 0..m {
        for j in 0..n {
            let start = (added(i, j), added(i, j).abs());
            let (sum, size) = terms.iter().fold(start, |(sum, size), (l, r)| {
                let (a, b) = want(*l, *r, i, j);
                (sum + a, size + b)
            });
            let got = f64::from(out[i * stride + j]);
            assert!((got - sum).abs() <= 1e-6 * size, "({i}, {j}) of {m}x{n}: {got}, not {sum}");
        }
    }
}

/// Both orientations of a matrix of noise `[rows, cols]`, with gaps between the rows.
fn layouts(data: &[f32], rows: usize, cols: usize) -> [Matrix<'_>; 2] {
    [Matrix::strided(data, rows, cols, cols + 3), Matrix::strided(data, cols, rows, rows + 5).t()]
}

#[test]
fn products_of_all_sizes_and_layouts() {
    let sizes = [
        (1, 1, 1),
        (1, 40, 33),
        (33, 1, 31),
        (32, 32, 32),
        (31, 65, 1),
        (70, 64, 96),
        (17, 600, 50),
        (40, 1700, 35),
        (530, 33, 20),
    ];
    for form in forms() {
        for (m, k, n) in sizes {
            let (a, b) = (noise((m + 5) * (k + 5), 1), noise((k + 5) * (n + 5), 2));
            for l in layouts(&a, m, k) {
                for r in layouts(&b, k, n) {
                    let stride = n + 2;
                    let mut out = vec![f32::NAN; m * stride];
                    let (x, y) = (lhs(form, l, Threads::All), rhs(form, r, Threads::One));
                    product(
                        (&mut out, stride),
                        false,
                        None,
                        &[(&x, &y)],
                        Reread::Soon,
                        Threads::All,
                    );
                    check((&out, stride), &[(l, r)], |_, _| 0.0);
                    let between = out.chunks(stride).flat_map(|row| &row[n..]);
                    assert!(between.into_iter().all(|x| x.is_nan()), "wrote between the rows");
                }
            }
        }
    }
}

#[test]
fn beta_bias_and_terms() {
    for form in forms() {
        // Whole blocks, ragged ones, and sums that wait in the output.
        for (m, k, n, r) in [(64, 96, 64, 8), (45, 610, 50, 64), (65, 1800, 64, 33)] {
            let (x, w) = (noise(m * k, 3), noise(n * k, 4));
            let (h, b) = (noise(m * r, 5), noise(n * r, 6));
            let (old, bias) = (noise(m * n, 7), noise(n, 8));
            let (x, w) = (Matrix::new(&x, m, k), Matrix::new(&w, n, k).t());
            let (h, b) = (Matrix::new(&h, m, r), Matrix::new(&b, n, r).t());
            let all = Threads::All;
            let packed =
                [(lhs(form, x, all), rhs(form, w, all)), (lhs(form, h, all), rhs(form, b, all))];
            for count in [1, 2] {
                for beta in [false, true] {
                    for with_bias in [false, true] {
                        let mut out = if beta { old.clone() } else { vec![f32::NAN; m * n] };
                        let terms: Vec<_> = packed.iter().map(|(l, r)| (l, r)).collect();
                        let given = with_bias.then_some(&bias[..]);
                        product(
                            (&mut out, n),
                            beta,
                            given,
                            &terms[..count],
                            Reread::Soon,
                            Threads::One,
                        );
                        check((&out, n), &[(x, w), (h, b)][..count], |i, j| {
                            let old = if beta { f64::from(old[i * n + j]) } else { 0.0 };
                            old + if with_bias { f64::from(bias[j]) } else { 0.0 }
                        });
                    }
                }
            }
        }
    }
}

#[test]
fn nothing_to_sum() {
    for form in forms() {
        let l = lhs(form, Matrix::new(&[], 33, 0), Threads::One);
        let r = rhs(form, Matrix::new(&[], 0, 40), Threads::One);
        let mut out = vec![2.0; 33 * 40];
        product((&mut out, 40), true, Some(&[1.0; 40]), &[(&l, &r)], Reread::Soon, Threads::One);
        assert_eq!(out, [3.0; 33 * 40]);
        product((&mut out, 40), false, None, &[(&l, &r)], Reread::Soon, Threads::All);
        assert_eq!(out, [0.0; 33 * 40]);
        let none = lhs(form, Matrix::new(&[], 0, 0), Threads::All);
        product((&mut [], 40), false, None, &[(&none, &r)], Reread::Soon, Threads::All);
        let none = rhs(form, Matrix::new(&[], 0, 0), Threads::All);
        product((&mut [], 0), false, None, &[(&l, &none)], Reread::Soon, Threads::All);
    }
}

#[test]
fn rows_made_block_by_block() {
    let make = |rows: Range<usize>, cols: usize, out: &mut [f32]| {
        assert_eq!(out.len(), rows.len() * cols);
        for (i, out) in rows.zip(out.chunks_exact_mut(cols)) {
            out.copy_from_slice(&noise(cols, 100 + i as u64));
        }
    };
    for form in forms() {
        for (rows, cols) in [(1, 1), (33, 70), (64, 64), (100, 31)] {
            let mut w = vec![0.0; rows * cols];
            make(0..rows, cols, &mut w);
            let w = Matrix::new(&w, rows, cols);
            for transposed in [false, true] {
                let r = if transposed { w.t() } else { w };
                let mut packed = Rhs(Packed::empty(Side::Rhs, form));
                packed.refill_rows((rows, cols), transposed, |range, out| make(range, cols, out));
                let whole = rhs(form, r, Threads::All);
                assert_eq!(packed.0.data(), whole.0.data());
                let a = noise(20 * r.size().0, 9);
                let l = Matrix::new(&a, 20, r.size().0);
                let n = r.size().1;
                let mut out = vec![f32::NAN; 20 * n];
                let x = lhs(form, l, Threads::One);
                product((&mut out, n), false, None, &[(&x, &packed)], Reread::Soon, Threads::All);
                check((&out, n), &[(l, r)], |_, _| 0.0);
            }
        }
    }
}

/// Other sizes in the same memory leave nothing of the old ones.
#[test]
fn buffers_are_used_again() {
    for form in forms() {
        let mut x = lhs(form, Matrix::new(&[f32::NAN; 4000], 50, 80), Threads::One);
        let mut y = rhs(form, Matrix::new(&[f32::NAN; 4000], 80, 50), Threads::One);
        let (a, b) = (noise(33 * 35, 1), noise(35 * 37, 2));
        let (l, r) = (Matrix::new(&a, 33, 35), Matrix::new(&b, 35, 37));
        x.0.fill(l, 1.0, Threads::One);
        y.refill(r, Threads::One);
        let mut out = vec![f32::NAN; 33 * 37];
        product((&mut out, 37), false, None, &[(&x, &y)], Reread::Soon, Threads::One);
        check((&out, 37), &[(l, r)], |_, _| 0.0);
    }
}

#[test]
fn threads_do_not_matter() {
    let (m, k, n, r) = (600, 1700, 200, 16);
    let (a, b) = (noise(m * k, 1), noise(n * k, 2));
    let (h, c) = (noise(m * r, 3), noise(n * r, 4));
    for form in forms() {
        let compute = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let all = Threads::All;
                let x = lhs(form, Matrix::new(&a, m, k), all);
                let y = rhs(form, Matrix::new(&b, n, k).t(), all);
                let u = lhs(form, Matrix::new(&h, m, r), all);
                let v = rhs(form, Matrix::new(&c, n, r).t(), all);
                let mut out = vec![0.0; m * n];
                product((&mut out, n), false, None, &[(&x, &y), (&u, &v)], Reread::Soon, all);
                out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            })
        };
        let one = compute(1);
        for threads in [2, 3, 8] {
            assert!(compute(threads) == one, "{threads} threads change bits");
        }
    }
}

/// An element that is no number spoils its row or column, and nothing else.
#[test]
fn nan_and_infinity_stay_where_they_belong() {
    let (m, k, n) = (35, 40, 50);
    for form in forms() {
        for bad in [f32::NAN, f32::INFINITY] {
            let (mut a, mut b) = (noise(m * k, 1), noise(k * n, 2));
            a[34 * k + 39] = bad;
            b[39 * n + 49] = bad;
            let x = lhs(form, Matrix::new(&a, m, k), Threads::One);
            let y = rhs(form, Matrix::new(&b, k, n), Threads::One);
            let mut out = vec![0.0; m * n];
            product((&mut out, n), false, None, &[(&x, &y)], Reread::Soon, Threads::One);
            for i in 0..m {
                for j in 0..n {
                    assert_eq!(out[i * n + j].is_finite(), i != 34 && j != 49, "({i}, {j})");
                }
            }
            assert_eq!(out[0].is_nan() || out[34 * n].is_nan(), bad.is_nan());
        }
    }
}

#[test]
fn small_products() {
    for (m, k, n) in [(128, 64, 128), (5, 7, 9), (128, 100, 64)] {
        let (a, b, old) =
            (noise((m + 5) * (k + 5), 1), noise((k + 5) * (n + 5), 2), noise(m * n, 3));
        for l in layouts(&a, m, k) {
            for r in layouts(&b, k, n) {
                // A power of two changes no rounding.
                for (beta, alpha) in [(false, 1.0), (true, 0.125)] {
                    let mut out = old.clone();
                    product_of((&mut out, n), beta, alpha, l, r);
                    let old = |i: usize, j: usize| {
                        if beta { f64::from(old[i * n + j] / alpha) } else { 0.0 }
                    };
                    out.iter_mut().for_each(|x| *x /= alpha);
                    check((&out, n), &[(l, r)], old);
                }
            }
        }
    }
}

/// Outputs may be written past the caches, by their size and when they are read; with the same
/// bits, also where k has to be summed in parts.
#[test]
fn large_outputs() {
    for (m, k, n) in [(560, 8, 8208), (560, 8, 1040), (560, 1700, 1040)] {
        let (a, b) = (noise(m * k, 1), noise(k * n, 2));
        for form in forms() {
            let x = lhs(form, Matrix::new(&a, m, k), Threads::All);
            let y = rhs(form, Matrix::new(&b, k, n), Threads::All);
            let mut memory = vec![f32::NAN; m * n + 16];
            let start = memory.as_ptr().align_offset(64);
            let (mut outs, bias) = (Vec::new(), vec![0.0; n]);
            for (shift, reread) in
                [(start, Reread::Soon), (start, Reread::Late), ((start + 1) & 15, Reread::Late)]
            {
                let out = &mut memory[shift..][..m * n];
                product((&mut *out, n), false, Some(&bias), &[(&x, &y)], reread, Threads::All);
                outs.push(out.to_vec());
            }
            assert!(outs.iter().all(|out| *out == outs[0]));
            let rows = |from: usize| Matrix::new(&a[from * k..], 4, k);
            for from in [0, 520] {
                let terms = [(rows(from), Matrix::new(&b, k, n))];
                check((&outs[0][from * n..], n), &terms, |_, _| 0.0);
            }
        }
    }
}

/// What goes through a function is what the product gives, rounded, then the function, rounded:
/// to the bit, on any number of threads, kept or not, at sizes that fill no square and with a k
/// that is summed in parts.
#[test]
fn through_functions() {
    let f = |x: &[f32], out: &mut [f32]| out.iter_mut().zip(x).for_each(|(o, x)| *o = x * x * x);
    let back = |x: &[f32], g: &[f32], out: &mut [f32]| {
        out.iter_mut().zip(x.iter().zip(g)).for_each(|(o, (x, g))| *o = 3.0 * x * x * g);
    };
    let read = |x: &Lhs| {
        let (m, n) = x.size();
        let mut out = vec![f32::NAN; m * n];
        x.read(0..m, &mut out);
        out
    };
    let round = |x: &[f32]| -> Vec<f32> { x.iter().map(|x| bf16::from_f32(*x).to_f32()).collect() };
    for (m, k, n) in [(1, 1, 1), (33, 70, 45), (64, 64, 96), (130, 1700, 33), (0, 5, 7)] {
        let (a, b, bias) = (noise(m * k, 1), noise(k * n, 2), noise(n, 3));
        let (c, d) = (noise(m * 3, 4), noise(3 * n, 5));
        for form in forms() {
            let x = lhs(form, Matrix::new(&a, m, k), Threads::All);
            let y = rhs(form, Matrix::new(&b, k, n), Threads::All);
            let u = lhs(form, Matrix::new(&c, m, 3), Threads::All);
            let v = rhs(form, Matrix::new(&d, 3, n), Threads::All);
            let all = [(&x, &y), (&u, &v)];
            for (bias, terms) in [(None, &all[..1]), (Some(&bias[..]), &all[..])] {
                let mut sum = vec![f32::NAN; m * n];
                product((&mut sum, n), false, bias, terms, Reread::Soon, Threads::All);
                let (sum, mut want) = (round(&sum), vec![0.0; m * n]);
                f(&sum, &mut want);
                let (mut g, mut want_back) = (vec![0.0; m * n], vec![0.0; m * n]);
                product((&mut g, n), false, None, terms, Reread::Soon, Threads::All);
                back(&sum, &g, &mut want_back);
                for threads in 1..4 {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                    pool.unwrap().install(|| {
                        let (out, none) = Lhs::through(f, bias, terms, false);
                        assert!(none.is_none() && read(&out) == round(&want));
                        let (out, kept) = Lhs::through(f, bias, terms, true);
                        let kept = kept.unwrap();
                        assert!(read(&out) == round(&want) && read(&kept) == sum);
                        let out = kept.back_through(back, terms);
                        assert!(read(&out) == round(&want_back), "{m} {k} {n} {threads}");
                    });
                }
            }
        }
    }
}

#[test]
#[should_panic(expected = "inner sizes")]
fn refuses_other_inner_sizes() {
    let l = Lhs::new(Matrix::new(&[0.0; 6], 2, 3), Threads::One);
    let r = Rhs::new(Matrix::new(&[0.0; 8], 4, 2), Threads::One);
    product((&mut [0.0; 4], 2), false, None, &[(&l, &r)], Reread::Soon, Threads::One);
}

#[test]
#[should_panic(expected = "outside its slice")]
fn refuses_to_write_outside() {
    let l = Lhs::new(Matrix::new(&[0.0; 6], 2, 3), Threads::One);
    let r = Rhs::new(Matrix::new(&[0.0; 6], 3, 2), Threads::One);
    product((&mut [0.0; 3], 2), false, None, &[(&l, &r)], Reread::Soon, Threads::One);
}

/// Tiles are found where the kernel lists them, and a thread made later may use them.
#[test]
#[cfg(target_os = "linux")]
fn detection() {
    let listed = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let listed = listed.split_whitespace().any(|flag| flag == "amx_bf16");
    assert_eq!(tiles(), listed);
    assert_eq!(std::thread::spawn(tiles).join().unwrap(), listed);
}
