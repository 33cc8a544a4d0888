//! Memory that a device reads: its own, pinned memory of the host, and registered pages of a map.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::{DriverError, result, sys};

use super::device::Context;
use super::error::Context as _;
use super::{CudaError, Device};
use crate::shape::check;

/// Bytes of device memory. Kernels write through shared references, as no reference of Rust reaches the bytes.
#[derive(Debug)]
pub struct Buffer {
    context: Arc<Context>,
    address: u64,
    len_bytes: usize,
}

/// A part of a [`Buffer`] or of [`Mapped`] pages.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    address: u64,
    len_bytes: usize,
    owner: PhantomData<&'a Buffer>,
}

/// Page-locked memory of the host: copies from and to it run while the host goes on.
#[derive(Debug)]
pub struct HostBuffer {
    context: Arc<Context>,
    address: *mut c_void,
    len_bytes: usize,
}

// SAFETY: the memory belongs to the buffer alone; the driver's calls are thread-safe.
unsafe impl Send for HostBuffer {}

/// Pages of the host that the device reads in place.
#[derive(Debug)]
pub struct Mapped<'a> {
    context: Arc<Context>,
    host: &'a [u8],
    address: u64,
}

impl Device {
    /// `len_bytes` of device memory, zeroed.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`] with the sizes.
    pub fn alloc(&self, len_bytes: usize) -> Result<Buffer, CudaError> {
        self.context.make_current()?;
        // The driver refuses allocations of nothing.
        let size = len_bytes.max(1);
        // SAFETY: the context is current; the address goes into the buffer that frees it.
        let address = match unsafe { result::malloc_sync(size) } {
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                let (free_bytes, total_bytes) = self.memory_bytes()?;
                return Err(CudaError::OutOfMemory { wanted_bytes: len_bytes, free_bytes, total_bytes });
            }
            other => other.during("allocate device memory")?,
        };
        let buffer = Buffer { context: self.context.clone(), address, len_bytes };
        // SAFETY: the bytes were just allocated.
        unsafe { result::memset_d8_async(address, 0, size, self.stream()) }.during("clear device memory")?;
        Ok(buffer)
    }

    /// Device memory with the bytes of `values`.
    ///
    /// # Errors
    /// As [`Device::alloc`].
    pub fn upload<T: bytemuck::NoUninit>(&self, values: &[T]) -> Result<Buffer, CudaError> {
        let buffer = self.alloc(size_of_val(values))?;
        self.write(buffer.view(), values)?;
        Ok(buffer)
    }

    /// Copies `values` to `to`, and waits.
    ///
    /// # Errors
    /// [`CudaError::Shape`] unless the lengths are equal.
    pub fn write<T: bytemuck::NoUninit>(&self, to: View<'_>, values: &[T]) -> Result<(), CudaError> {
        check("bytes to write", to.len_bytes, size_of_val(values))?;
        // SAFETY: both sides are as long as checked, and the wait below keeps the source alive.
        unsafe { result::memcpy_htod_async(to.address, values, self.stream()) }
            .during("copy to the device")?;
        self.synchronize()
    }

    /// Copies `from` to `values`, and waits.
    ///
    /// # Errors
    /// [`CudaError::Shape`] unless the lengths are equal.
    pub fn read<T: bytemuck::AnyBitPattern + bytemuck::NoUninit>(
        &self,
        from: View<'_>,
        values: &mut [T],
    ) -> Result<(), CudaError> {
        check("bytes to read", from.len_bytes, size_of_val(values))?;
        // SAFETY: both sides are as long as checked, and the wait below keeps the target alive.
        unsafe { result::memcpy_dtoh_async(values, from.address, self.stream()) }
            .during("copy from the device")?;
        self.synchronize()
    }

    /// `len_bytes` of page-locked memory of the host, zeroed.
    ///
    /// # Errors
    /// [`CudaError::Driver`] when the system has none left.
    pub fn alloc_host(&self, len_bytes: usize) -> Result<HostBuffer, CudaError> {
        self.context.make_current()?;
        let size = len_bytes.max(1);
        // SAFETY: the context is current; the address goes into the buffer that frees it.
        let address = unsafe { result::malloc_host(size, 0) }.during("allocate page-locked memory")?;
        // SAFETY: `size` bytes from `address` on were just allocated.
        unsafe { address.cast::<u8>().write_bytes(0, size) };
        Ok(HostBuffer { context: self.context.clone(), address, len_bytes })
    }

    /// Starts copying the first bytes of `from` to `to`; [`Device::synchronize`] or an event says when they arrived.
    ///
    /// # Safety
    /// Nobody changes or frees `from` before that.
    ///
    /// # Errors
    /// [`CudaError::Shape`] when `from` is shorter than `to`.
    pub unsafe fn write_later(&self, to: View<'_>, from: &HostBuffer) -> Result<(), CudaError> {
        check("bytes to write", to.len_bytes.min(from.len_bytes), to.len_bytes)?;
        let bytes = &from.bytes()[..to.len_bytes];
        // SAFETY: both sides are as long as checked; the caller keeps the source.
        unsafe { result::memcpy_htod_async(to.address, bytes, self.stream()) }.during("copy to the device")
    }

    /// Starts copying `from` to the first bytes of `to`.
    ///
    /// # Safety
    /// Nobody reads or frees `to` before [`Device::synchronize`] or an event says that they arrived.
    ///
    /// # Errors
    /// [`CudaError::Shape`] when `to` is shorter than `from`.
    pub unsafe fn read_later(&self, from: View<'_>, to: &mut HostBuffer) -> Result<(), CudaError> {
        check("bytes to read", from.len_bytes.min(to.len_bytes), from.len_bytes)?;
        let bytes = &mut to.bytes_mut()[..from.len_bytes];
        // SAFETY: both sides are as long as checked; the caller keeps the target.
        unsafe { result::memcpy_dtoh_async(bytes, from.address, self.stream()) }
            .during("copy from the device")
    }

    /// Lets the device read `host` where it lies, without a copy.
    ///
    /// # Errors
    /// [`CudaError::Driver`] where the system cannot lock or share the pages.
    pub fn map_host<'a>(&self, host: &'a [u8]) -> Result<Mapped<'a>, CudaError> {
        self.context.make_current()?;
        let flags = sys::CU_MEMHOSTREGISTER_DEVICEMAP | sys::CU_MEMHOSTREGISTER_READ_ONLY;
        let pointer = host.as_ptr().cast_mut().cast::<c_void>();
        // SAFETY: the pages are alive for 'a, which outlives the registration, and are only read.
        unsafe { sys::cuMemHostRegister_v2(pointer, host.len(), flags) }
            .result()
            .during("register pages of the file")?;
        let mut mapped = Mapped { context: self.context.clone(), host, address: 0 };
        // SAFETY: the pages were just registered for the device.
        unsafe { sys::cuMemHostGetDevicePointer_v2(&mut mapped.address, pointer, 0) }
            .result()
            .during("address registered pages")?;
        Ok(mapped)
    }
}

impl Buffer {
    /// All of it.
    pub fn view(&self) -> View<'_> {
        View { address: self.address, len_bytes: self.len_bytes, owner: PhantomData }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.context.make_current().is_ok() {
            // SAFETY: allocated by `alloc`, freed once. A driver that refuses has lost the device with its memory.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}

impl<'a> View<'a> {
    /// `len_bytes` bytes from `offset_bytes` on.
    ///
    /// # Panics
    /// If they do not lie inside.
    pub fn slice(self, offset_bytes: usize, len_bytes: usize) -> Self {
        assert!(
            offset_bytes.checked_add(len_bytes).is_some_and(|end| end <= self.len_bytes),
            "{len_bytes} bytes from {offset_bytes} on lie outside of {}",
            self.len_bytes
        );
        Self { address: self.address + offset_bytes as u64, len_bytes, owner: PhantomData }
    }

    /// This and `next` as one, if `next` begins where this ends.
    pub(super) fn joined(self, next: Self) -> Option<Self> {
        let is_next = next.address == self.address + self.len_bytes as u64;
        is_next.then_some(Self { len_bytes: self.len_bytes + next.len_bytes, ..self })
    }

    /// Length.
    pub fn len_bytes(self) -> usize {
        self.len_bytes
    }

    /// Address on the device.
    pub(super) fn address(self) -> u64 {
        self.address
    }
}

impl HostBuffer {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `len_bytes` initialised bytes from `address` on are this buffer's.
        unsafe { std::slice::from_raw_parts(self.address.cast(), self.len_bytes) }
    }

    /// The bytes.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and borrowed for writing.
        unsafe { std::slice::from_raw_parts_mut(self.address.cast(), self.len_bytes) }
    }
}

impl Drop for HostBuffer {
    /// Waits for copies that may be under way.
    fn drop(&mut self) {
        if self.context.make_current().is_ok() {
            // A driver that refuses has lost the device with its copies.
            let _ = self.context.synchronize();
            // SAFETY: allocated by `alloc_host`, freed once.
            let _ = unsafe { result::free_host(self.address) };
        }
    }
}

impl<'a> Mapped<'a> {
    /// The pages as the device sees them.
    pub fn view(&self) -> View<'_> {
        View { address: self.address, len_bytes: self.host.len(), owner: PhantomData }
    }
}

impl Drop for Mapped<'_> {
    fn drop(&mut self) {
        if self.context.make_current().is_ok() {
            // SAFETY: registered by `map_host`, released once.
            let _ = unsafe { sys::cuMemHostUnregister(self.host.as_ptr().cast_mut().cast()) }.result();
        }
    }
}
