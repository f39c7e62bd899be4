//! Matrix products by cublasLt.

// Calls of a C library that is opened at run time, see device.rs.
#![allow(unsafe_code)]

mod fastest;

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::rc::Rc;

use anyhow::{Result, anyhow};
use cudarc::cublaslt::result;
use cudarc::cublaslt::sys::{
    self, cublasLtMatmulAlgoConfigAttributes_t as Config,
    cublasLtMatmulDescAttributes_t as Attribute,
    cublasLtMatmulPreferenceAttributes_t as Preference,
};

use super::arena::Arena;
use super::device::{Device, Float, Mat};

/// Memory that a product may use beside its matrices.
const WORKSPACE: usize = 32 << 20;

/// A factor of a product.
#[derive(Debug, Clone, Copy)]
pub(super) struct Factor {
    pub(super) mat: Mat,
    pub(super) transposed: bool,
}

impl Mat {
    /// As it stands.
    pub(super) fn n(self) -> Factor {
        Factor { mat: self, transposed: false }
    }

    /// Transposed.
    pub(super) fn t(self) -> Factor {
        Factor { mat: self, transposed: true }
    }
}

/// What a product is added to and where it goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target {
    pub(super) to: Mat,
    /// Type of the result.
    pub(super) float: Float,
    /// Is added; of the result's type.
    pub(super) plus: Option<Mat>,
    /// Is added to every row; of the result's type.
    pub(super) bias: Option<u64>,
    /// Factor on the product.
    pub(super) alpha: f32,
}

/// What decides which algorithm computes a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    m: usize,
    n: usize,
    k: usize,
    transposed: (bool, bool),
    /// Row strides of both factors, of what is added and of the result.
    lds: [usize; 4],
    /// Alignments of the same, as powers of two.
    alignments: [u32; 4],
    floats: (Float, Float),
    plus: bool,
    bias: bool,
}

/// A way to compute a product, and the memory that it takes beside the matrices.
#[derive(Debug, Clone, Copy)]
struct Algorithm {
    algo: sys::cublasLtMatmulAlgo_t,
    workspace: usize,
}

impl Algorithm {
    /// Whether each sum is made in one piece. Then it is made in the order of its terms, whatever
    /// tiles the result is cut into.
    fn whole_sums(&self) -> bool {
        let (mut parts, mut written) = (0_i32, 0);
        let attribute = Config::CUBLASLT_ALGO_CONFIG_SPLITK_NUM;
        // Safety: the attribute is 4 bytes, as the value is.
        let status = unsafe {
            let to = (&raw mut parts).cast();
            let algo = &raw const self.algo;
            sys::cublasLtMatmulAlgoConfigGetAttribute(algo, attribute, to, 4, &raw mut written)
        };
        status.result().is_ok() && parts <= 1
    }
}

/// A described product and its algorithm.
struct Plan {
    desc: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 4],
    algorithm: Algorithm,
}

/// A product's factors and where it goes.
#[derive(Debug, Clone, Copy)]
struct Product {
    a: Mat,
    b: Mat,
    target: Target,
}

/// Algorithms that the library is asked for, best first by its own guess.
const ALGORITHMS: usize = 8;

/// The library and the products that it has planned.
pub(super) struct Matmuls {
    handle: sys::cublasLtHandle_t,
    plans: RefCell<HashMap<Shape, Rc<Plan>>>,
    workspace: RefCell<Option<u64>>,
    /// Which algorithms were the fastest, see [`Device::fastest`].
    fastest: RefCell<HashMap<Shape, sys::cublasLtMatmulAlgo_t>>,
}

fn failed(e: result::CublasError) -> anyhow::Error {
    anyhow!("a matrix product on the GPU: {:?}", e.0)
}

fn data_type(float: Float) -> sys::cudaDataType {
    match float {
        Float::F32 => sys::cudaDataType_t::CUDA_R_32F,
        Float::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
    }
}

fn alignment(at: u64) -> u32 {
    at.trailing_zeros().min(8)
}

impl Plan {
    /// With the algorithm that the library thinks the best, and all that it thinks good.
    fn new(
        handle: sys::cublasLtHandle_t,
        s: &Shape,
    ) -> Result<(Self, Vec<Algorithm>), result::CublasError> {
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let desc = result::create_matmul_desc(compute, sys::cudaDataType_t::CUDA_R_32F)?;
        let set = |attribute, value: &i32| {
            let value: *const i32 = value;
            // Safety: the value is 4 bytes, as these attributes are.
            unsafe { result::set_matmul_desc_attribute(desc, attribute, value.cast(), 4) }
        };
        // The library's matrices are column-major: a row-major one is its transpose there, so the
        // factors change places.
        let (a, b) = s.transposed;
        set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &i32::from(b))?;
        set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, &i32::from(a))?;
        if s.bias {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as i32;
            set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
        }
        let (input, output) = (data_type(s.floats.0), data_type(s.floats.1));
        let layout = |ty, rows: usize, cols: usize, ld: usize| {
            result::create_matrix_layout(ty, rows as u64, cols as u64, ld as i64)
        };
        let stored = |across: usize, down: usize, turned: bool| match turned {
            true => (down, across),
            false => (across, down),
        };
        let (first, second) = (stored(s.n, s.k, b), stored(s.k, s.m, a));
        let layouts = [
            layout(input, first.0, first.1, s.lds[1])?,
            layout(input, second.0, second.1, s.lds[0])?,
            layout(output, s.n, s.m, s.lds[2])?,
            layout(output, s.n, s.m, s.lds[3])?,
        ];
        let preference = result::create_matmul_pref()?;
        let prefer = |attribute, value: *const c_void, size| {
            // Safety: the value is as large as said.
            unsafe { result::set_matmul_pref_attribute(preference, attribute, value, size) }
        };
        let room: u64 = WORKSPACE as u64;
        let attribute = Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        prefer(attribute, (&raw const room).cast(), 8)?;
        let places = [
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, s.alignments[1]),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, s.alignments[0]),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, s.alignments[2]),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, s.alignments[3]),
        ];
        for (attribute, power) in places {
            let bytes: u32 = 1 << power;
            prefer(attribute, (&raw const bytes).cast(), 4)?;
        }
        let [a, b, c, d] = layouts;
        let (mut found, mut count) = (Vec::with_capacity(ALGORITHMS), 0);
        // Safety: all handles are alive; the library writes as many results as it says, at most as
        // many as there is room for.
        let status = unsafe {
            let to = found.as_mut_ptr();
            let most = ALGORITHMS as i32;
            let status = sys::cublasLtMatmulAlgoGetHeuristic(
                handle,
                desc,
                a,
                b,
                c,
                d,
                preference,
                most,
                to,
                &raw mut count,
            );
            if status == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS {
                found.set_len((count.max(0) as usize).min(ALGORITHMS));
            }
            status
        };
        // Safety: it is not used again.
        unsafe { result::destroy_matmul_pref(preference) }?;
        status.result()?;
        let algorithms: Vec<_> = found
            .iter()
            .filter(|f: &&sys::cublasLtMatmulHeuristicResult_t| f.state.result().is_ok())
            .map(|f| Algorithm { algo: f.algo, workspace: f.workspaceSize })
            .collect();
        let none = result::CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED);
        let algorithm = *algorithms.first().ok_or(none)?;
        Ok((Self { desc, layouts, algorithm }, algorithms))
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // Safety: they are this plan's; an error leaves them to the end of the process.
        unsafe {
            let _ = result::destroy_matmul_desc(self.desc);
            for layout in self.layouts {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}

impl Matmuls {
    pub(super) fn open() -> Result<Self> {
        let handle = result::create_handle().map_err(failed)?;
        Ok(Self {
            handle,
            plans: RefCell::default(),
            workspace: RefCell::default(),
            fastest: RefCell::default(),
        })
    }

    /// Takes the memory that products use beside their matrices.
    pub(super) fn reserve(&self, arena: &Arena) -> Result<()> {
        *self.workspace.borrow_mut() = Some(arena.alloc(WORKSPACE)?);
        Ok(())
    }
}

impl Drop for Matmuls {
    fn drop(&mut self) {
        self.plans.borrow_mut().clear();
        // Safety: nothing uses it any more; an error leaves it to the end of the process.
        unsafe {
            let _ = result::destroy_handle(self.handle);
        }
    }
}

impl Device {
    /// `to = alpha a b + plus + bias` for `a` `[m, k]` and `b` `[k, n]`, both of the device's type
    /// of numbers; sums are f32.
    pub(super) fn matmul(
        &self,
        (m, n, k): (usize, usize, usize),
        a: Factor,
        b: Factor,
        target: Target,
    ) -> Result<()> {
        if self.dry.get() {
            return Ok(());
        }
        let product = Product { a: a.mat, b: b.mat, target };
        let mats = [a.mat, b.mat, target.plus.unwrap_or(target.to), target.to];
        let shape = Shape {
            m,
            n,
            k,
            transposed: (a.transposed, b.transposed),
            lds: mats.map(|mat| mat.ld),
            alignments: mats.map(|mat| alignment(mat.at)),
            floats: (self.float, target.float),
            plus: target.plus.is_some(),
            bias: target.bias.is_some(),
        };
        let plan = self.matmuls.plans.borrow().get(&shape).cloned();
        let plan = match plan {
            Some(plan) => plan,
            None => {
                let (mut plan, all) = Plan::new(self.matmuls.handle, &shape)
                    .map_err(|e| failed(e).context(format!("planning {shape:?}")))?;
                plan.algorithm = self.fastest(&plan, &shape, &product, &all)?;
                let plan = Rc::new(plan);
                self.matmuls.plans.borrow_mut().insert(shape, plan.clone());
                plan
            }
        };
        self.multiply(&plan, plan.algorithm, &product)
    }

    /// Starts a product.
    fn multiply(&self, plan: &Plan, by: Algorithm, product: &Product) -> Result<()> {
        let Product { a, b, target: Target { to, plus, bias, alpha, .. } } = *product;
        let c = plus.unwrap_or(to);
        if let Some(bias) = bias {
            let attribute = Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
            // Safety: the value is an address, as the attribute is.
            unsafe {
                let value = (&raw const bias).cast();
                result::set_matmul_desc_attribute(plan.desc, attribute, value, 8)
            }
            .map_err(failed)?;
        }
        let beta: f32 = if plus.is_some() { 1.0 } else { 0.0 };
        let workspace = self.matmuls.workspace.borrow().unwrap_or(0);
        let room = if workspace == 0 { 0 } else { by.workspace };
        let [first, second, third, fourth] = plan.layouts;
        // Safety: addresses are of arenas, and as large as the layouts say.
        unsafe {
            result::matmul(
                self.matmuls.handle,
                plan.desc,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                b.at as *const c_void,
                first,
                a.at as *const c_void,
                second,
                c.at as *const c_void,
                third,
                to.at as *mut c_void,
                fourth,
                &raw const by.algo,
                workspace as *mut c_void,
                room,
                self.stream.cast(),
            )
        }
        .map_err(failed)
    }
}
