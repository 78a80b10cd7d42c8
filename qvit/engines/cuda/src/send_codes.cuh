// Codes go out through shared memory, as bytes or as planes of bits.
#pragma once

// A warp's codes [kWM][kOut], which lie in `lines`, go out in pieces of 16 bytes.
template <class Where>
__device__ __forceinline__ void send(const unsigned char* lines, int lane, int row0, int rows, const Where& where) {
    __syncwarp();
    for (int i = lane; i < kWM * (kOut / 16); i += 32) {
        const int row = i / (kOut / 16), piece = i % (kOut / 16);
        if (row0 + row < rows) {
            if (unsigned char* to = where(row0 + row, 16 * piece)) {
                *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(lines + row * kLine + 16 * piece);
            }
        }
    }
}

#if OUT_BITS
// The same as planes of bits, 32 columns a lane at a time; `first`: column of the first, `row_of`: where a row goes.
template <class RowOf>
__device__ __forceinline__ void send_bits(const unsigned char* lines, int lane, int row0, int rows, void* to, int first, int columns,
                                          int chunks, const RowOf& row_of) {
    __syncwarp();
    for (int i = lane; i < kWM * (kOut / 32); i += 32) {
        const int row = i / (kOut / 32), c = i % (kOut / 32) * 32;
        if (row0 + row < rows && first + c < columns) {
            const uint32_t* codes = reinterpret_cast<const uint32_t*>(lines + row * kLine + c);
            uint32_t high = 0, low = 0;
#pragma unroll
            for (int w = 0; w < 8; w++) {
                high |= four_bits(codes[w], 1) << (4 * w);
                low |= four_bits(codes[w], 0) << (4 * w);
            }
            unsigned char* out = static_cast<unsigned char*>(to);
            const int line = row_of(row0 + row);
            *reinterpret_cast<uint32_t*>(out + code_at(line, bit_at(first + c, 1), chunks)) = high;
            *reinterpret_cast<uint32_t*>(out + code_at(line, bit_at(first + c, 0), chunks)) = low;
        }
    }
}
#endif

__device__ __forceinline__ void put(unsigned char* lines, int row, int column, int first, int second) {
    *reinterpret_cast<uint16_t*>(lines + row * kLine + column) = static_cast<uint16_t>((first & 0xFF) | (second & 0xFF) << 8);
}
