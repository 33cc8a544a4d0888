//! Devices: what there is, and one opened with its kernels and a stream.

use std::collections::HashMap;
use std::ffi::{CStr, c_void};
use std::sync::Arc;

use cudarc::driver::sys::{CUdevice_attribute_enum as Attribute, CUfunction_attribute as FunctionAttribute};
use cudarc::driver::{result, sys};

use super::error::Context as _;
use super::{CudaError, image};

/// Lowest driver that can launch the kernels, 1000 * major + 10 * minor.
const DRIVER_MIN: i32 = 12_040;
/// Lowest compute capability that the kernels are compiled for.
const CAPABILITY_MIN: (u32, u32) = (8, 0);
/// Bytes that a bandwidth measurement reads: many times what a GPU caches.
const BANDWIDTH_BYTES: usize = 2 << 30;
/// Passes over them; the best counts.
const BANDWIDTH_PASSES: usize = 5;
/// Shared memory that a block has without asking.
const SHARED_BYTES_UNASKED: usize = 48 << 10;

/// What `--list-devices` says about a device.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceInfo {
    /// Its number.
    pub ordinal: usize,
    /// Its maker's name for it.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// Memory not in use.
    pub free_bytes: usize,
    /// Memory.
    pub total_bytes: usize,
    /// The device shares the host's memory, so that pages of a file can be used in place.
    pub integrated: bool,
    /// Driver, as CUDA numbers it: 1000 * major + 10 * minor.
    pub driver: i32,
}

/// An open device: context, kernels and one stream on which everything runs in order.
#[derive(Debug)]
pub struct Device {
    pub(super) context: Arc<Context>,
    kernels: HashMap<String, sys::CUfunction>,
    info: DeviceInfo,
    n_multiprocessors: usize,
    shared_bytes_max: usize,
    overlap: bool,
    n_ahead: usize,
}

/// The primary context of a device, its module and its stream; everything allocated holds on to it.
#[derive(Debug)]
pub(super) struct Context {
    device: sys::CUdevice,
    context: sys::CUcontext,
    module: sys::CUmodule,
    stream: sys::CUstream,
}

// SAFETY: handles of the driver, whose functions are thread-safe; `make_current` binds them to the calling thread.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}
// SAFETY: the functions in `kernels` are handles of the driver as well.
unsafe impl Send for Device {}

/// A recorded run of kernels, launched as one.
#[derive(Debug)]
pub struct Graph {
    context: Arc<Context>,
    exec: sys::CUgraphExec,
}

// SAFETY: a handle of the driver, as in `Context`.
unsafe impl Send for Graph {}

/// A point in a stream.
#[derive(Debug)]
pub struct Event {
    context: Arc<Context>,
    event: sys::CUevent,
}

// SAFETY: a handle of the driver, as in `Context`.
unsafe impl Send for Event {}

/// Every visible device, whether the kernels support it or not.
///
/// # Errors
/// [`CudaError::NoDriver`], [`CudaError::DriverStart`], [`CudaError::NoDevice`].
pub fn list_devices() -> Result<Vec<DeviceInfo>, CudaError> {
    start_driver()?;
    let count = result::device::get_count().during("count devices")? as usize;
    if count == 0 {
        return Err(CudaError::NoDevice);
    }
    (0..count)
        .map(|ordinal| {
            let device = result::device::get(ordinal as i32).during("find a device")?;
            // SAFETY: the device exists; the context is released below.
            let context = unsafe { result::primary_ctx::retain(device) }.during("open a device")?;
            // SAFETY: the context was just retained.
            let info = unsafe { result::ctx::set_current(context) }
                .during("use a device")
                .and_then(|()| device_info(device, ordinal));
            // SAFETY: retained above.
            unsafe { result::primary_ctx::release(device) }.during("close a device")?;
            info
        })
        .collect()
}

impl Device {
    /// Opens device `ordinal` and loads the kernels.
    ///
    /// # Errors
    /// [`CudaError::NotBuiltIn`], and as [`list_devices`]; [`CudaError::NoSuchDevice`], [`CudaError::DriverTooOld`],
    /// [`CudaError::DeviceTooOld`].
    pub fn open(ordinal: usize) -> Result<Self, CudaError> {
        let image = image::IMAGE.ok_or(CudaError::NotBuiltIn)?;
        let driver = start_driver()?;
        if driver < DRIVER_MIN {
            return Err(CudaError::DriverTooOld { found: driver, needed: DRIVER_MIN });
        }
        let count = result::device::get_count().during("count devices")? as usize;
        if count == 0 {
            return Err(CudaError::NoDevice);
        }
        if ordinal >= count {
            return Err(CudaError::NoSuchDevice { ordinal, count });
        }
        let device = result::device::get(ordinal as i32).during("find the device")?;
        let capability = capability(device)?;
        if capability < CAPABILITY_MIN {
            let name = result::device::get_name(device).during("name the device")?;
            return Err(CudaError::DeviceTooOld { name, capability });
        }
        let context = Arc::new(Context::open(device, image)?);
        let info = device_info(device, ordinal)?;
        let kernels = context.functions()?;
        Ok(Self {
            kernels,
            n_multiprocessors: attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?
                as usize,
            shared_bytes_max: attribute(
                device,
                Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
            )? as usize,
            overlap: false,
            n_ahead: 0,
            context,
            info,
        })
    }

    /// What it is; `free_bytes` as of [`Device::open`].
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// Streaming multiprocessors.
    pub fn n_multiprocessors(&self) -> usize {
        self.n_multiprocessors
    }

    /// True if a kernel may start while the one before ends.
    pub fn overlaps(&self) -> bool {
        self.overlap
    }

    /// Lets a kernel start while the one before ends (programmatic dependent launch), where the device can: slower for
    /// large models, whose early blocks pack two to an SM.
    pub fn with_overlap(mut self) -> Self {
        self.overlap = self.info.capability >= (9, 0);
        self
    }

    /// Sets how many segments each warp of a dense product asks L2 for ahead of its loads, to measure what it is worth.
    pub fn with_ahead(mut self, n_ahead: usize) -> Self {
        self.n_ahead = n_ahead;
        self
    }

    /// Free and total memory, now.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn memory_bytes(&self) -> Result<(usize, usize), CudaError> {
        self.context.make_current()?;
        result::mem_get_info().during("ask for free memory")
    }

    /// Waits for everything launched so far.
    ///
    /// # Errors
    /// [`CudaError::Driver`]; what a kernel did wrong comes out here.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.context.synchronize()
    }

    /// Records what `launches` launches instead of running it.
    ///
    /// # Safety
    /// The graph keeps addresses: every buffer that `launches` names has to outlive it.
    ///
    /// # Errors
    /// Those of `launches`; [`CudaError::Driver`].
    pub unsafe fn capture(
        &self,
        launches: impl FnOnce() -> Result<(), CudaError>,
    ) -> Result<Graph, CudaError> {
        self.context.make_current()?;
        let stream = self.context.stream;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives as long as the context.
        unsafe { result::stream::begin_capture(stream, mode) }.during("begin a graph")?;
        let launched = launches();
        // SAFETY: begun above.
        let graph = unsafe { result::stream::end_capture(stream) }.during("end a graph");
        launched?;
        let graph = graph?;
        // SAFETY: the graph was just made, and is destroyed below.
        let exec = unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) };
        // SAFETY: an executable graph does not need the one it was made from.
        unsafe { result::graph::destroy(graph) }.during("drop a graph")?;
        let graph = Graph { context: self.context.clone(), exec: exec.during("make a graph")? };
        // SAFETY: graph and stream are alive.
        unsafe { result::graph::upload(graph.exec, stream) }.during("upload a graph")?;
        Ok(graph)
    }

    /// Launches what `graph` recorded.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn replay(&self, graph: &Graph) -> Result<(), CudaError> {
        self.context.make_current()?;
        // SAFETY: graph and stream are alive; `capture` has the promise about the buffers.
        unsafe { result::graph::launch(graph.exec, self.context.stream) }.during("launch a graph")
    }

    /// A point after everything launched so far.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn record(&self) -> Result<Event, CudaError> {
        self.context.make_current()?;
        let flags = sys::CUevent_flags::CU_EVENT_DEFAULT;
        let event = result::event::create(flags).during("make an event")?;
        let event = Event { context: self.context.clone(), event };
        // SAFETY: event and stream are alive.
        unsafe { result::event::record(event.event, self.context.stream) }.during("record an event")?;
        Ok(event)
    }

    /// Plain read bandwidth over fresh memory, in GB/s (10^9): the best of a few passes.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`] with less than 2 GiB free.
    pub fn measure_read_gb_per_s(&self) -> Result<f64, CudaError> {
        let memory = self.alloc(BANDWIDTH_BYTES)?;
        let sums = self.alloc(size_of::<u32>())?;
        let mut best = f64::INFINITY;
        for _ in 0..BANDWIDTH_PASSES {
            let start = self.record()?;
            self.read_all(memory.view(), sums.view())?;
            best = best.min(self.record()?.ms_since(&start)?);
        }
        Ok(BANDWIDTH_BYTES as f64 / best / 1e6)
    }

    pub(super) fn stream(&self) -> sys::CUstream {
        self.context.stream
    }

    /// Segments to ask L2 for ahead; none where a kernel starts after the one before has ended.
    pub(super) fn n_ahead(&self) -> usize {
        if self.overlap { self.n_ahead } else { 0 }
    }

    pub(super) fn shared_bytes_max(&self) -> usize {
        self.shared_bytes_max
    }

    /// True if the module for this device has `kernel`; some exist for one architecture alone.
    pub(super) fn has_kernel(&self, kernel: &str) -> bool {
        self.kernels.contains_key(kernel)
    }

    /// Launches `kernel` with one argument, a struct; it may start while the kernel before ends.
    ///
    /// # Safety
    /// `args` is the struct that the kernel declares, and every address in it is valid for what the kernel does there.
    pub(super) unsafe fn launch<A>(
        &self,
        kernel: &str,
        grid: [usize; 3],
        n_threads: usize,
        shared_bytes: usize,
        args: &A,
    ) -> Result<(), CudaError> {
        let attributes = self.overlap.then(overlap).into_iter().collect();
        // SAFETY: the caller's promise.
        unsafe { self.launch_with(kernel, grid, n_threads, shared_bytes, args, attributes) }
    }

    /// Launches `kernel` with all its blocks on the device at once, so that they can wait for each other. It may start
    /// while the kernel before ends where `overlaps`, which only one that waits for that itself allows.
    ///
    /// # Safety
    /// As [`Device::launch`].
    pub(super) unsafe fn launch_together<A>(
        &self,
        kernel: &str,
        n_blocks: usize,
        n_threads: usize,
        shared_bytes: usize,
        overlaps: bool,
        args: &A,
    ) -> Result<(), CudaError> {
        let together = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_COOPERATIVE,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue_union { cooperative: 1 },
        };
        let attributes = [together].into_iter().chain(overlaps.then(overlap)).collect();
        // SAFETY: the caller's promise.
        unsafe { self.launch_with(kernel, [n_blocks, 1, 1], n_threads, shared_bytes, args, attributes) }
    }

    /// # Safety
    /// As [`Device::launch`].
    unsafe fn launch_with<A>(
        &self,
        kernel: &str,
        grid: [usize; 3],
        n_threads: usize,
        shared_bytes: usize,
        args: &A,
        mut attributes: Vec<sys::CUlaunchAttribute>,
    ) -> Result<(), CudaError> {
        self.context.make_current()?;
        let function = self.kernels[kernel];
        if shared_bytes > SHARED_BYTES_UNASKED {
            let attribute = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function belongs to the loaded module.
            unsafe { result::function::set_function_attribute(function, attribute, shared_bytes as i32) }
                .during("ask for shared memory")?;
        }
        let config = sys::CUlaunchConfig {
            gridDimX: grid[0] as u32,
            gridDimY: grid[1] as u32,
            gridDimZ: grid[2] as u32,
            blockDimX: n_threads as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared_bytes as u32,
            hStream: self.context.stream,
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        let mut params = [std::ptr::from_ref(args).cast_mut().cast::<c_void>()];
        // SAFETY: the caller's promise; config and params are alive during the call, which copies them.
        unsafe { sys::cuLaunchKernelEx(&config, function, params.as_mut_ptr(), std::ptr::null_mut()) }
            .result()
            .during("launch a kernel")
    }
}

/// Programmatic dependent launch.
fn overlap() -> sys::CUlaunchAttribute {
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue_union { programmaticStreamSerializationAllowed: 1 },
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.context.make_current().is_ok() {
            // SAFETY: made by `capture`, destroyed once; a graph in flight ends first.
            let _ = unsafe { result::graph::exec_destroy(self.exec) };
        }
    }
}

impl Event {
    /// Waits for it.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn wait(&self) -> Result<(), CudaError> {
        self.context.make_current()?;
        // SAFETY: the event is alive.
        unsafe { result::event::synchronize(self.event) }.during("wait for an event")
    }

    /// Milliseconds of the device from `start` to this event, once both have passed.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn ms_since(&self, start: &Self) -> Result<f64, CudaError> {
        self.wait()?;
        // SAFETY: both events are alive and recorded.
        unsafe { result::event::elapsed(start.event, self.event) }.during("time events").map(f64::from)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.make_current().is_ok() {
            // SAFETY: made by `record`, destroyed once.
            let _ = unsafe { result::event::destroy(self.event) };
        }
    }
}

impl Context {
    fn open(device: sys::CUdevice, image: &[u8]) -> Result<Self, CudaError> {
        // SAFETY: the device exists; `Drop` releases what was retained.
        let context = unsafe { result::primary_ctx::retain(device) }.during("open the device")?;
        let mut opened = Self { device, context, module: std::ptr::null_mut(), stream: std::ptr::null_mut() };
        opened.make_current()?;
        // SAFETY: the image is a fat binary, which carries its own length.
        opened.module =
            unsafe { result::module::load_data(image.as_ptr().cast()) }.during("load the kernels")?;
        opened.stream =
            result::stream::create(result::stream::StreamKind::NonBlocking).during("make a stream")?;
        Ok(opened)
    }

    /// Makes the device the calling thread's.
    pub(super) fn make_current(&self) -> Result<(), CudaError> {
        // SAFETY: the context is retained until `Drop`.
        unsafe { result::ctx::set_current(self.context) }.during("use the device")
    }

    /// Waits for everything launched so far.
    pub(super) fn synchronize(&self) -> Result<(), CudaError> {
        self.make_current()?;
        // SAFETY: the stream lives as long as the context.
        unsafe { result::stream::synchronize(self.stream) }.during("wait for the device")
    }

    /// Every kernel of the module by name, all with the same split of an SM's memory into shared memory and cache: a
    /// change of the split between two kernels would keep them from overlapping.
    fn functions(&self) -> Result<HashMap<String, sys::CUfunction>, CudaError> {
        let mut count = 0;
        // SAFETY: the module is loaded; writes one int.
        unsafe { sys::cuModuleGetFunctionCount(&mut count, self.module) }.result().during("count kernels")?;
        let mut functions = vec![std::ptr::null_mut(); count as usize];
        // SAFETY: there is room for `count` functions.
        unsafe { sys::cuModuleEnumerateFunctions(functions.as_mut_ptr(), count, self.module) }
            .result()
            .during("list kernels")?;
        let carveout = FunctionAttribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
        functions
            .into_iter()
            .map(|function| {
                let mut name = std::ptr::null();
                // SAFETY: the function is the module's; the name lives as long as the module.
                let name = unsafe {
                    sys::cuFuncGetName(&mut name, function).result().during("name a kernel")?;
                    CStr::from_ptr(name)
                };
                // SAFETY: the function is the module's.
                unsafe { result::function::set_function_attribute(function, carveout, 100) }
                    .during("prepare a kernel")?;
                Ok((name.to_string_lossy().into_owned(), function))
            })
            .collect()
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if self.make_current().is_err() {
            return;
        }
        // SAFETY: what `open` made, destroyed once and in reverse; null where it failed half-way. A driver that
        // refuses has lost the device.
        unsafe {
            if !self.stream.is_null() {
                let _ = result::stream::destroy(self.stream);
            }
            if !self.module.is_null() {
                let _ = result::module::unload(self.module);
            }
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

/// Opens and starts the driver; its version.
fn start_driver() -> Result<i32, CudaError> {
    // SAFETY: opens the driver's library, whose initialisation is the driver's own. Asked first, because what follows
    // panics without it.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    if let Err(error) = result::init() {
        return match error.0 {
            sys::CUresult::CUDA_ERROR_NO_DEVICE => Err(CudaError::NoDevice),
            code => Err(CudaError::DriverStart(format!("{code:?}"))),
        };
    }
    let mut version = 0;
    // SAFETY: writes one int.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().during("ask the driver's version")?;
    Ok(version)
}

/// Of the current context's device.
fn device_info(device: sys::CUdevice, ordinal: usize) -> Result<DeviceInfo, CudaError> {
    let (free_bytes, total_bytes) = result::mem_get_info().during("ask for free memory")?;
    Ok(DeviceInfo {
        ordinal,
        name: result::device::get_name(device).during("name the device")?,
        capability: capability(device)?,
        free_bytes,
        total_bytes,
        integrated: attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_INTEGRATED)? != 0,
        driver: start_driver()?,
    })
}

fn capability(device: sys::CUdevice) -> Result<(u32, u32), CudaError> {
    Ok((
        attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? as u32,
        attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)? as u32,
    ))
}

fn attribute(device: sys::CUdevice, attribute: Attribute) -> Result<i32, CudaError> {
    // SAFETY: the device exists.
    unsafe { result::device::get_attribute(device, attribute) }.during("ask about the device")
}
