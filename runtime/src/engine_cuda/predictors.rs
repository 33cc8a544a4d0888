//! What layers predict with, as kernels take it: parts of the file lie in its image, others in buffers of their own.

use kernels::cuda::{
    Buffer, CudaError, Device, DeviceLimits, DeviceLowRank, DevicePlanes, DeviceResidual, DeviceRows,
    DeviceThresholds, Mirror, View,
};
use kernels::{BitPlanes, LowRank, Residual};

use super::decode::Way;
use super::{ModelState, element_bytes};
use crate::engine::RowChoice;
use crate::model::LayerWeights;

/// Bytes of predictors that are not the file's, and where they lie on the device.
#[derive(Debug, Default)]
pub(super) struct OwnParts<'m>(Vec<(&'m [u8], Buffer)>);

impl<'m> OwnParts<'m> {
    /// Brings what `layers` predict with to `device`, but for what `image` holds.
    fn new(device: &Device, image: &Mirror<'m>, layers: &[LayerWeights<'m>]) -> Result<Self, CudaError> {
        let parts = layers.iter().flat_map(parts).filter(|part| image.find(part).is_none());
        Ok(Self(parts.map(|part| Ok((part, device.upload(part)?))).collect::<Result<_, CudaError>>()?))
    }

    /// `part` as the device sees it, if it is one of these.
    pub(super) fn find(&self, part: &[u8]) -> Option<View<'_>> {
        let own = self.0.iter().find(|(own, _)| std::ptr::eq(*own, part));
        own.map(|(_, buffer)| buffer.view())
    }
}

/// Everything that `layer` predicts with.
fn parts<'m>(layer: &LayerWeights<'m>) -> impl Iterator<Item = &'m [u8]> {
    let planes = layer.planes.map(|BitPlanes { signs, low }| [signs.words, low].map(bytemuck::cast_slice));
    let factors = layer.low_rank.map(|LowRank { fc1, fc2, .. }| [fc1, fc2].map(|w| element_bytes(&w.data)));
    let residual = layer.low_rank.and_then(|factors| factors.residual);
    let residual = residual
        .map(|Residual { signs, scales }| [bytemuck::cast_slice(signs.words), bytemuck::cast_slice(scales)]);
    let parts = [planes, factors, residual].into_iter().flatten().flatten();
    // Signs alone have no planes below.
    parts.filter(|part| !part.is_empty())
}

impl<'m> ModelState<'m> {
    /// Has layers predict with `planes` and `factors`, one of each for each layer.
    pub(super) fn set_predictors(
        &mut self,
        planes: &[Option<BitPlanes<'m>>],
        factors: &[Option<LowRank<'m>>],
    ) -> Result<(), CudaError> {
        // First, as there may be no room for both.
        self.own_parts = OwnParts::default();
        self.weights.set_predictors(planes, factors);
        self.own_parts = OwnParts::new(&self.device, &self.image, &self.weights.layers)?;
        // Which kernel runs a token, and how that is cut, depends on the largest rank.
        self.way = Way::new(&self.device, &self.shape, &self.weights)?;
        Ok(())
    }

    fn low_rank(&self, factors: &LowRank<'_>) -> Result<DeviceLowRank<'_>, CudaError> {
        let residual = factors.residual.map(|Residual { signs, scales }| DeviceResidual {
            signs: self.view(signs.words),
            scales: self.floats(scales),
        });
        let (fc1, fc2) = (self.matrix(&factors.fc1)?, self.matrix(&factors.fc2)?);
        Ok(DeviceLowRank { fc1, fc2, relu: factors.relu, residual })
    }

    /// The rows of `layer` that `choice` selects.
    pub(super) fn rows(&self, layer: usize, choice: &RowChoice) -> Result<DeviceRows<'_>, CudaError> {
        let planes = || {
            self.weights.layers[layer].planes.expect("checked when limits were set: the layer has sign words")
        };
        let predicted = |limits| DeviceRows::Predicted { signs: self.view(planes().signs.words), limits };
        let scored = |thresholds| {
            if let Some(factors) = &self.weights.layers[layer].low_rank {
                return Ok(DeviceRows::LowRank { factors: self.low_rank(factors)?, thresholds });
            }
            let BitPlanes { signs, low } = planes();
            let low = (!low.is_empty()).then(|| self.view(low));
            let planes = DevicePlanes { signs: self.view(signs.words), low };
            Ok(DeviceRows::Scored { planes, thresholds })
        };
        let of_rows = || {
            let limits = self.limits.as_ref().and_then(|limits| limits[layer].as_ref());
            limits.expect("bring_limits comes first").view()
        };
        match choice {
            RowChoice::All => Ok(DeviceRows::All),
            RowChoice::Active => Ok(DeviceRows::Active),
            RowChoice::Limit(limit) => Ok(predicted(DeviceLimits::Layer(*limit))),
            RowChoice::RowLimits(_) => Ok(predicted(DeviceLimits::PerRow(of_rows()))),
            RowChoice::Threshold(threshold) => scored(DeviceThresholds::Layer(*threshold)),
            RowChoice::RowThresholds(_) => scored(DeviceThresholds::PerRow(of_rows())),
        }
    }
}
