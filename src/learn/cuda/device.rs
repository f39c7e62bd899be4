//! One GPU: its stream, the kernels, and launches.

// The driver is a C library that is opened at run time; every call crosses into it. What is passed
// are handles that this file made and addresses of the arenas; a wrong address in a kernel's
// arguments stops the GPU's work with an error, it cannot touch the program's own memory.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ffi::{CString, c_void};
use std::fmt;

use anyhow::{Context as _, Result, bail};
use cudarc::driver::{result, sys};

use super::matmul::Matmuls;
use crate::source::Fault;

/// The oldest driver that takes the kernels (see ptx.sh), as it gives its version.
const DRIVER: i32 = 12_030;

/// Blocks that share a row of logits in [`Device::shared_loss`].
pub(super) const SHARERS: [usize; 3] = [2, 4, 8];

/// Bytes of such a block for its part of the row, at most: two run at once.
pub(super) const LOSS_ROOM: usize = 100 << 10;

/// Type of the numbers of activations and frozen weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Float {
    F32,
    Bf16,
}

impl Float {
    pub(super) fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// A row-major matrix on the GPU: an address and elements from row to row.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mat {
    pub(super) at: u64,
    pub(super) ld: usize,
}

/// An argument of a kernel, as the bits that the kernel reads.
pub(super) type Arg = u64;

/// A size or an index, `int` in the kernels.
pub(super) fn int(x: usize) -> Arg {
    // Sizes of one batch; what does not fit would be more than a GPU holds.
    u64::from(i32::try_from(x).unwrap_or(i32::MAX) as u32)
}

/// `float` in the kernels.
pub(super) fn float(x: f64) -> Arg {
    u64::from((x as f32).to_bits())
}

macro_rules! kernels {
    ($($name:ident),* $(,)?) => {
        /// The kernels, by name.
        #[derive(Debug, Clone, Copy)]
        pub(super) struct Kernels { $(pub(super) $name: Kernel,)* }

        impl Kernels {
            fn load(module: sys::CUmodule) -> Result<Self> {
                Ok(Self { $($name: Kernel::get(module, stringify!($name))?,)* })
            }
        }
    };
}

kernels!(
    rms_norm,
    rms_norm_backward,
    layer_norm,
    layer_norm_backward,
    column_sums,
    add_parts,
    rope,
    norm_heads,
    norm_heads_backward,
    swiglu,
    swiglu_backward,
    gelu,
    gelu_backward,
    activate,
    activate_backward,
    embed,
    embed_backward,
    pick,
    copy_columns,
    cross_entropy,
    dropout,
    widen,
    nf4_dequantize,
    place_adapters,
    add_tiles,
    copy_trained,
    square_sums,
    adamw,
);

/// Kernels of adapters in bf16.
#[derive(Debug, Clone, Copy)]
pub(super) struct Adapters {
    pub(super) gradients: Kernel,
    pub(super) dropped_ranks: Kernel,
    pub(super) dropped_gradient: Kernel,
}

impl Adapters {
    fn load(module: sys::CUmodule) -> Result<Self> {
        Ok(Self {
            gradients: Kernel::get(module, "adapter_gradients")?,
            dropped_ranks: Kernel::get(module, "dropped_ranks")?,
            dropped_gradient: Kernel::get(module, "dropped_gradient")?,
        })
    }
}

/// A kernel of a loaded module.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kernel(sys::CUfunction);

// A handle of the driver, which is thread-safe.
unsafe impl Send for Kernel {}
unsafe impl Sync for Kernel {}

impl Kernel {
    pub(super) fn get(module: sys::CUmodule, name: &str) -> Result<Self> {
        // Safety: the module is loaded and never unloaded.
        let found = unsafe { result::module::get_function(module, CString::new(name)?) };
        found.map(Self).with_context(|| format!("the kernel `{name}`"))
    }

    /// Allows it this much shared memory in a block.
    pub(super) fn shared_memory(self, bytes: usize) -> Result<Self> {
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // Safety: the function is loaded.
        unsafe { result::function::set_function_attribute(self.0, attribute, bytes as i32) }
            .map_err(failed)?;
        Ok(self)
    }
}

/// Threads and blocks of a launch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    pub(super) blocks: (usize, usize, usize),
    pub(super) threads: (usize, usize),
    pub(super) shared: usize,
}

impl Grid {
    /// One thread for each of `n` things.
    pub(super) fn each(n: usize) -> Self {
        Self { blocks: (n.div_ceil(256).max(1), 1, 1), threads: (256, 1), shared: 0 }
    }

    /// Some threads for each of `rows` rows of `width` elements.
    pub(super) fn rows(rows: usize, width: usize) -> Self {
        let (across, down) = if width > 1024 { (256, 1) } else { (32, 4) };
        Self { blocks: (rows.div_ceil(down).max(1), 1, 1), threads: (across, down), shared: 0 }
    }

    /// One block for each of `n` things.
    pub(super) fn blocks(n: usize, threads: usize) -> Self {
        Self { blocks: (n.max(1), 1, 1), threads: (threads, 1), shared: 0 }
    }
}

/// A failed call of the driver, in its words.
pub(super) fn failed(e: result::DriverError) -> anyhow::Error {
    let text = e.error_string().ok().and_then(|s| s.to_str().ok()).unwrap_or("unknown error");
    anyhow::anyhow!("the GPU: {text} ({:?})", e.0)
}

/// One GPU and what runs on it.
pub(super) struct Device {
    context: sys::CUcontext,
    device: sys::CUdevice,
    pub(super) stream: sys::CUstream,
    pub(super) float: Float,
    pub(super) kernels: Kernels,
    /// Those of adapters, where there are some for the type of numbers.
    pub(super) adapters: Option<Adapters>,
    pub(super) attention: sys::CUmodule,
    /// Kernels for Hopper, where the card is one and those of attention suit the model.
    pub(super) hopper: Option<sys::CUmodule>,
    /// The loss with a row shared by blocks, likewise.
    pub(super) shared_loss: Option<[Kernel; SHARERS.len()]>,
    pub(super) matmuls: Matmuls,
    /// Nothing is done: only how much memory it would take is wanted.
    pub(super) dry: Cell<bool>,
    name: String,
}

// Handles of the driver, which is thread-safe; the rest is only read.
unsafe impl Send for Device {}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Names of the GPUs that the driver shows, by ordinal; none without a driver.
pub fn devices() -> Vec<String> {
    // Safety: looks whether the library is there before any of it is called.
    if !unsafe { sys::is_culib_present() } || result::init().is_err() {
        return Vec::new();
    }
    let count = result::device::get_count().unwrap_or(0);
    (0..count).filter_map(|i| result::device::get_name(result::device::get(i).ok()?).ok()).collect()
}

/// Compiles what ptx.sh made of a source. The driver keeps the result for the next time.
fn load(packed: &[u8], name: &str) -> Result<sys::CUmodule> {
    let text = CString::new(zstd::decode_all(packed)?)?;
    // Safety: the text ends with a zero and is read before the call returns.
    unsafe { result::module::load_data(text.as_ptr().cast::<c_void>()) }
        .map_err(failed)
        .with_context(|| format!("compiling {name} for this GPU"))
}

fn shared_loss(module: sys::CUmodule) -> Result<[Kernel; SHARERS.len()]> {
    let get = |blocks| Kernel::get(module, &format!("cross_entropy_{blocks}_sm90"));
    let [two, four, eight] = SHARERS.map(|n| get(n).and_then(|k| k.shared_memory(LOSS_ROOM)));
    Ok([two?, four?, eight?])
}

impl Device {
    /// The first GPU that the process sees (`CUDA_VISIBLE_DEVICES`), for a model with heads of
    /// `head` elements.
    ///
    /// # Errors
    /// When there is no driver, no GPU, or the CUDA libraries are missing.
    pub(super) fn open(float: Float, head: usize) -> Result<Self> {
        // Safety: asks whether the libraries are there before anything of them is called.
        let (driver, blas) =
            unsafe { (sys::is_culib_present(), cudarc::cublaslt::sys::is_culib_present()) };
        if !driver || devices().is_empty() {
            return Err(Fault::new("there is no GPU here that CUDA can use")
                .help("look at `nvidia-smi`; `--device cpu` computes on the CPU")
                .into());
        }
        if !blas {
            return Err(Fault::new("the CUDA library cublasLt was not found")
                .help(
                    "install the CUDA toolkit (12.8 or newer), or name the folder of \
                       libcublasLt.so in LD_LIBRARY_PATH",
                )
                .into());
        }
        let mut version = 0;
        // Safety: writes a number; every driver has the call.
        unsafe { sys::cuDriverGetVersion(&raw mut version) }.result().map_err(failed)?;
        if version < DRIVER {
            let words = |v: i32| format!("{}.{}", v / 1000, v % 1000 / 10);
            let message = format!("the GPU's driver is of CUDA {}", words(version));
            let help = format!(
                "install a driver of CUDA {} or newer (`nvidia-smi` shows it at the top right); \
                 `--device cpu` computes on the CPU",
                words(DRIVER)
            );
            return Err(Fault::new(message).help(help).into());
        }
        let device = result::device::get(0).map_err(failed)?;
        let name = result::device::get_name(device).map_err(failed)?;
        // Safety: the device exists; the context is kept for the life of the process.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(failed)?;
        unsafe { result::ctx::set_current(context) }.map_err(failed)?;
        let kind = result::stream::StreamKind::NonBlocking;
        let stream = result::stream::create(kind).map_err(failed)?;
        let kernels = match float {
            Float::F32 => &include_bytes!("ptx/kernels_f32.zst")[..],
            Float::Bf16 => include_bytes!("ptx/kernels_bf16.zst"),
        };
        let attention = match (float, head) {
            (Float::Bf16, 32) => &include_bytes!("ptx/attention_32.zst")[..],
            (Float::Bf16, 64) => include_bytes!("ptx/attention_64.zst"),
            (Float::Bf16, 96) => include_bytes!("ptx/attention_96.zst"),
            (Float::Bf16, 128) => include_bytes!("ptx/attention_128.zst"),
            _ => include_bytes!("ptx/attention_any.zst"),
        };
        use sys::CUdevice_attribute as Attribute;
        let capability = |attribute| {
            // Safety: the device exists.
            unsafe { result::device::get_attribute(device, attribute) }.map_err(failed)
        };
        let major = capability(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = capability(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if major < 8 {
            let message = format!("{name} has compute capability {major}.{minor}");
            let help = "the kernels need 8.0 (Ampere) or newer; `--device cpu` computes on the CPU";
            return Err(Fault::new(message).help(help).into());
        }
        let suits = float == Float::Bf16 && [64, 128].contains(&head) && (major, minor) == (9, 0);
        let hopper = suits
            .then(|| load(include_bytes!("ptx/hopper.zst"), "the kernels for Hopper"))
            .transpose()?;
        let kernels = load(kernels, "the kernels")?;
        let adapters = (float == Float::Bf16).then(|| Adapters::load(kernels)).transpose()?;
        Ok(Self {
            context,
            device,
            stream,
            float,
            kernels: Kernels::load(kernels)?,
            adapters,
            attention: load(attention, "the attention kernels")?,
            hopper,
            shared_loss: hopper.map(shared_loss).transpose()?,
            matmuls: Matmuls::open()?,
            dry: Cell::new(false),
            name,
        })
    }

    pub(super) fn context(&self) -> sys::CUcontext {
        self.context
    }

    /// Ordinal of the device, for allocations.
    pub(super) fn ordinal(&self) -> i32 {
        self.device
    }

    /// Makes it the one that this thread talks to.
    pub(super) fn bind(&self) -> Result<()> {
        // Safety: the context is alive.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed)
    }

    /// Total and free bytes of its memory.
    pub(super) fn memory(&self) -> Result<(usize, usize)> {
        let (free, total) = result::mem_get_info().map_err(failed)?;
        Ok((total, free))
    }

    /// The part of a matrix from a row and a column on.
    pub(super) fn part(&self, mat: Mat, row: usize, col: usize) -> Mat {
        Mat { at: mat.at + ((row * mat.ld + col) * self.float.size()) as u64, ld: mat.ld }
    }

    /// Starts a kernel.
    pub(super) fn launch(&self, kernel: Kernel, grid: Grid, args: &[Arg]) -> Result<()> {
        self.launch_with(kernel, grid, args, &())
    }

    /// Starts a kernel whose last parameter is a struct.
    pub(super) fn launch_with<T>(
        &self,
        kernel: Kernel,
        grid: Grid,
        args: &[Arg],
        last: &T,
    ) -> Result<()> {
        let mut pointers = [std::ptr::null_mut::<c_void>(); 40];
        if args.len() >= pointers.len() {
            bail!("a kernel with {} arguments", args.len());
        }
        pointers[args.len()] = std::ptr::from_ref(last).cast_mut().cast();
        if self.dry.get() {
            return Ok(());
        }
        for (p, arg) in pointers.iter_mut().zip(args) {
            // The driver reads as many bytes as the kernel's parameter has, low ones first.
            *p = std::ptr::from_ref(arg).cast_mut().cast();
        }
        let ((x, y, z), (across, down)) = (grid.blocks, grid.threads);
        let blocks = (x as u32, y as u32, z as u32);
        let threads = (across as u32, down as u32, 1);
        // Safety: the arguments live until the call returns; they were copied by then.
        unsafe {
            result::launch_kernel(
                kernel.0,
                blocks,
                threads,
                grid.shared as u32,
                self.stream,
                &mut pointers[..=args.len()],
            )
        }
        .map_err(failed)
    }

    /// Copies to the GPU.
    pub(super) fn upload<T: Copy>(&self, to: u64, data: &[T]) -> Result<()> {
        if data.is_empty() || self.dry.get() {
            return Ok(());
        }
        // Safety: the target has room for it (arenas), and pageable memory is copied before the
        // call returns.
        unsafe { result::memcpy_htod_async(to, data, self.stream) }.map_err(failed)
    }

    /// Copies rows of `width` elements to a matrix.
    pub(super) fn upload_rows<T: Copy>(&self, to: Mat, data: &[T], width: usize) -> Result<()> {
        if data.is_empty() || width == to.ld {
            return self.upload(to.at, data);
        }
        let size = size_of::<T>();
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_HOST,
            srcHost: data.as_ptr().cast(),
            srcDevice: 0,
            srcArray: std::ptr::null_mut(),
            srcPitch: width * size,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstHost: std::ptr::null_mut(),
            dstDevice: to.at,
            dstArray: std::ptr::null_mut(),
            dstPitch: to.ld * size,
            WidthInBytes: width * size,
            Height: data.len() / width,
        };
        self.synchronize()?;
        // Safety: source and target are as large as described.
        unsafe { sys::cuMemcpy2D_v2(&raw const copy) }.result().map_err(failed)
    }

    /// Copies from the GPU, after all that was started has ended.
    pub(super) fn download<T: Copy + Default>(&self, from: u64, n: usize) -> Result<Vec<T>> {
        let mut data = vec![T::default(); n];
        if n > 0 && !self.dry.get() {
            // Safety: the buffer is as large as what is copied, and lives until the copy is done.
            unsafe { result::memcpy_dtoh_async(&mut data, from, self.stream) }.map_err(failed)?;
        }
        self.synchronize()?;
        Ok(data)
    }

    /// Sets bytes to zero.
    pub(super) fn zero(&self, at: u64, bytes: usize) -> Result<()> {
        if bytes == 0 || self.dry.get() {
            return Ok(());
        }
        // Safety: the memory is of an arena.
        unsafe { result::memset_d8_async(at, 0, bytes, self.stream) }.map_err(failed)
    }

    /// Waits for all that was started.
    pub(super) fn synchronize(&self) -> Result<()> {
        // Safety: the stream is alive.
        unsafe { result::stream::synchronize(self.stream) }.map_err(failed)
    }
}
