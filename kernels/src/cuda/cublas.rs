//! Products by cuBLASLt, opened at run time.
//!
//! A plan (descriptors and algorithm) is made once for each shape, the workspace once. Algorithms that add up with
//! atomics are left out, so that a product has the same bits every time.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::sync::OnceLock;

use cudarc::cublaslt::result::CublasError;
use cudarc::cublaslt::{result, sys};

use super::{Buffer, CudaError, Device, Dtype, GemmCall};

/// What the library recommends for Hopper; elsewhere it uses less.
pub(super) const WORKSPACE_BYTES: usize = 32 << 20;
/// Most plans kept: many times the shapes of a model's prompts, some kilobytes each.
const PLANS_MAX: usize = 512;
/// `cublasOperation_t`.
const OPERATION_NONE: i32 = 0;
const OPERATION_TRANSPOSE: i32 = 1;
/// Best alignment that the library asks about.
const ALIGNMENT_MAX: u32 = 256;

/// True if cuBLASLt can be opened. It stays open: opening takes about a tenth of a second.
pub(super) fn is_there() -> bool {
    static LIBRARY: OnceLock<Option<libloading::Library>> = OnceLock::new();
    // SAFETY: opens NVIDIA's library, whose initialisation is its own.
    let open = |name: String| unsafe { libloading::Library::new(name) }.ok();
    let open_first = || cudarc::get_lib_name_candidates("cublasLt").into_iter().find_map(open);
    LIBRARY.get_or_init(open_first).is_some()
}

/// The library with a handle.
#[derive(Debug)]
pub(super) struct Cublas {
    handle: sys::cublasLtHandle_t,
    workspace: Buffer,
    /// `None` for shapes that the library does not take.
    plans: HashMap<PlanKey, Option<Plan>>,
}

// SAFETY: the handle is the library's, which takes calls from any thread, one at a time.
unsafe impl Send for Cublas {}

/// What an algorithm depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct PlanKey {
    dtype: Dtype,
    transposed: bool,
    n_tokens: usize,
    n_in: usize,
    n_out: usize,
    /// Of w, x and y, in bytes.
    alignments: [u32; 3],
}

/// In the words of cuBLAS, whose matrices are column-major: `D (n_out, n_tokens) = op(A) B + beta D` with A the weights
/// and B the batch.
#[derive(Debug)]
struct Plan {
    desc: sys::cublasLtMatmulDesc_t,
    a: sys::cublasLtMatrixLayout_t,
    b: sys::cublasLtMatrixLayout_t,
    d: sys::cublasLtMatrixLayout_t,
    algo: sys::cublasLtMatmulAlgo_t,
}

impl Cublas {
    /// `None` where the library is not, or does not start.
    pub(super) fn open(device: &Device) -> Result<Option<Self>, CudaError> {
        // Asked first, because what follows panics without the library.
        if !is_there() {
            return Ok(None);
        }
        device.context.make_current()?;
        let workspace = device.alloc(WORKSPACE_BYTES)?;
        // A library that does not start here, such as one for other devices, is as good as none.
        Ok(result::create_handle().ok().map(|handle| Self { handle, workspace, plans: HashMap::new() }))
    }

    /// `call`, whose lengths were checked; false if the library does not take this shape.
    pub(super) fn multiply(&mut self, device: &Device, call: &GemmCall<'_>) -> Result<bool, CudaError> {
        device.context.make_current()?;
        let plane_bytes = (call.n_tokens * call.n_in() * call.w.dtype().n_bytes()) as u64;
        let n_planes = call.x.len_bytes() as u64 / plane_bytes.max(1);
        let planes = (0..n_planes).map(|plane| call.x.address() + plane * plane_bytes);
        let alignment = |address: u64| ALIGNMENT_MAX.min(1 << address.trailing_zeros().min(8));
        let key = PlanKey {
            dtype: call.w.dtype(),
            transposed: call.transposed,
            n_tokens: call.n_tokens,
            n_in: call.n_in(),
            n_out: call.n_out(),
            alignments: [
                alignment(call.w.data().address()),
                planes.clone().map(alignment).min().unwrap_or(1),
                alignment(call.y.address()),
            ],
        };
        if self.plans.len() == PLANS_MAX && !self.plans.contains_key(&key) {
            // Rare enough to begin anew; products under way do not need their plan any more.
            self.plans.clear();
        }
        let plan = match self.plans.entry(key) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(Plan::new(self.handle, &key).during("plan a product")?),
        };
        let Some(plan) = plan else {
            return Ok(false);
        };
        let alpha = 1.0_f32;
        for (plane, x) in planes.enumerate() {
            let beta = if call.accumulate || plane > 0 { 1.0_f32 } else { 0.0 };
            // SAFETY: the plan's layouts describe buffers whose lengths were checked by `Gemm::multiply`; handle,
            // workspace and stream live as long as `self` and `device`.
            unsafe {
                result::matmul(
                    self.handle,
                    plan.desc,
                    (&raw const alpha).cast(),
                    (&raw const beta).cast(),
                    call.w.data().address() as *const c_void,
                    plan.a,
                    x as *const c_void,
                    plan.b,
                    call.y.address() as *const c_void,
                    plan.d,
                    call.y.address() as *mut c_void,
                    plan.d,
                    &plan.algo,
                    self.workspace.view().address() as *mut c_void,
                    WORKSPACE_BYTES,
                    device.stream().cast(),
                )
            }
            .during("multiply a batch")?;
        }
        Ok(true)
    }
}

impl Drop for Cublas {
    fn drop(&mut self) {
        self.plans.clear();
        // SAFETY: made by `open`, destroyed once, after the plans.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

impl Plan {
    /// `None` if the library has no algorithm for `key`.
    fn new(handle: sys::cublasLtHandle_t, key: &PlanKey) -> Result<Option<Self>, CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as DescAttribute;
        use sys::cublasLtMatmulPreferenceAttributes_t as PrefAttribute;
        use sys::cudaDataType_t::{CUDA_R_16BF, CUDA_R_16F, CUDA_R_32F};

        let weights = match key.dtype {
            Dtype::F32 => CUDA_R_32F,
            Dtype::F16 => CUDA_R_16F,
            Dtype::Bf16 => CUDA_R_16BF,
        };
        let (n_in, n_out, n_tokens) = (key.n_in as u64, key.n_out as u64, key.n_tokens as u64);
        let (a_rows, a_cols) = if key.transposed { (n_out, n_in) } else { (n_in, n_out) };
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let mut plan = Self {
            desc: result::create_matmul_desc(compute, CUDA_R_32F)?,
            a: std::ptr::null_mut(),
            b: std::ptr::null_mut(),
            d: std::ptr::null_mut(),
            algo: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
        };
        plan.a = result::create_matrix_layout(weights, a_rows, a_cols, a_rows as i64)?;
        plan.b = result::create_matrix_layout(weights, n_in, n_tokens, n_in as i64)?;
        plan.d = result::create_matrix_layout(CUDA_R_32F, n_out, n_tokens, n_out as i64)?;
        let operation: i32 = if key.transposed { OPERATION_NONE } else { OPERATION_TRANSPOSE };
        // SAFETY: the attribute is an operation, which has the size of an int; read during the call.
        unsafe {
            result::set_matmul_desc_attribute(
                plan.desc,
                DescAttribute::CUBLASLT_MATMUL_DESC_TRANSA,
                (&raw const operation).cast(),
                size_of_val(&operation),
            )?;
        }

        let preference = Preference(result::create_matmul_pref()?);
        let schemes = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        preference.set(PrefAttribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE_BYTES)?;
        preference.set(PrefAttribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes)?;
        let [w, x, y] = &key.alignments;
        preference.set(PrefAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, w)?;
        preference.set(PrefAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, x)?;
        preference.set(PrefAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, y)?;
        preference.set(PrefAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, y)?;
        // SAFETY: handle, descriptors and preference are alive.
        let found = unsafe {
            result::get_matmul_algo_heuristic(handle, plan.desc, plan.a, plan.b, plan.d, plan.d, preference.0)
        };
        match found {
            Ok(found) => {
                plan.algo = found.algo;
                Ok(Some(plan))
            }
            Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: what `new` made, destroyed once; null where it failed half-way.
        unsafe {
            for layout in [self.a, self.b, self.d].into_iter().filter(|layout| !layout.is_null()) {
                let _ = result::destroy_matrix_layout(layout);
            }
            let _ = result::destroy_matmul_desc(self.desc);
        }
    }
}

/// What is asked of an algorithm.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn set<T>(
        &self,
        attribute: sys::cublasLtMatmulPreferenceAttributes_t,
        value: &T,
    ) -> Result<(), CublasError> {
        // SAFETY: the value is read during the call, which refuses a size that is not the attribute's.
        unsafe {
            result::set_matmul_pref_attribute(
                self.0,
                attribute,
                std::ptr::from_ref(value).cast(),
                size_of::<T>(),
            )
        }
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

/// Adds what was tried to the library's answer.
trait Context<T> {
    fn during(self, action: &'static str) -> Result<T, CudaError>;
}

impl<T> Context<T> for Result<T, CublasError> {
    fn during(self, action: &'static str) -> Result<T, CudaError> {
        self.map_err(|CublasError(status)| CudaError::Cublas { action, status: format!("{status:?}") })
    }
}
