//! Where a network is trained: the CPU, or an accelerator that this build has.
//!
//! Takes a name, as `device` in the settings or `--device` gives it, and opens the device, or says in
//! one sentence why there is none. On the CPU convolutions and exchanges run through this crate's own
//! kernels ([`crate::kernels`]); elsewhere through burn's layers, which give the same to rounding. The
//! controller is a few small matrices and always learns on the CPU.

use std::fmt;
use std::str::FromStr;

use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use crate::error::TrainError;

/// A device to train on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceName {
    /// The CPU: always there.
    #[default]
    Flex,
    /// A GPU through Vulkan; the cargo feature `vulkan`.
    Vulkan,
    /// A GPU through whatever interface the system has; the cargo feature `wgpu`.
    Wgpu,
    /// An NVIDIA GPU through CUDA; the cargo feature `cuda`, passed on to burn and not checked here.
    Cuda,
}

impl DeviceName {
    /// All of them.
    pub const ALL: [DeviceName; 4] =
        [DeviceName::Flex, DeviceName::Vulkan, DeviceName::Wgpu, DeviceName::Cuda];

    /// What it is called in settings and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            DeviceName::Flex => "flex",
            DeviceName::Vulkan => "vulkan",
            DeviceName::Wgpu => "wgpu",
            DeviceName::Cuda => "cuda",
        }
    }

    /// Opens it.
    ///
    /// # Errors
    /// The build does not have it, or the machine.
    pub(crate) fn open(self) -> Result<Device, TrainError> {
        match self {
            DeviceName::Flex => Ok(Device::flex()),
            #[cfg(feature = "vulkan")]
            DeviceName::Vulkan => graphics::open(self, graphics::WgpuBackend::Vulkan),
            #[cfg(feature = "wgpu")]
            DeviceName::Wgpu => graphics::open(self, graphics::WgpuBackend::Auto),
            #[cfg(feature = "cuda")]
            DeviceName::Cuda => Ok(Device::cuda(0)),
            #[cfg(not(all(feature = "vulkan", feature = "wgpu", feature = "cuda")))]
            name => {
                let reason = format!("not in this build; cargo build --features {name} has it");
                Err(TrainError::Device { name, reason })
            }
        }
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> Result<DeviceName, String> {
        let found = DeviceName::ALL.into_iter().find(|name| name.name() == text);
        found.ok_or(format!("device \"{text}\", expected flex, vulkan, wgpu or cuda"))
    }
}

#[cfg(any(feature = "vulkan", feature = "wgpu"))]
mod graphics {
    //! Devices behind a graphics interface.

    use burn::tensor::Device;
    pub(super) use burn::tensor::wgpu::WgpuBackend;
    use std::sync::{Mutex, PoisonError};

    use super::DeviceName;
    use crate::error::TrainError;

    /// What has been opened: it can be only once in the life of a process.
    static OPENED: Mutex<Vec<(DeviceName, Device)>> = Mutex::new(Vec::new());

    pub(super) fn open(name: DeviceName, api: WgpuBackend) -> Result<Device, TrainError> {
        let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, device)) = opened.iter().find(|(other, _)| *other == name) {
            return Ok(device.clone());
        }
        let found = Device::wgpu_options().graphics_api(api).init();
        let device = found.map_err(|error| {
            let reason = error.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
            TrainError::Device { name, reason }
        })?;
        opened.push((name, device.clone()));
        Ok(device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for name in DeviceName::ALL {
            assert_eq!(name.to_string().parse(), Ok(name));
        }
        let wrong = "tpu".parse::<DeviceName>().unwrap_err();
        assert_eq!(wrong, "device \"tpu\", expected flex, vulkan, wgpu or cuda");
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_device_that_is_not_built_in_is_one_sentence() {
        let error = DeviceName::Cuda.open().unwrap_err().to_string();
        let expected = "device: cuda: not in this build; cargo build --features cuda has it";
        assert_eq!(error, expected);
    }
}
