// Codes go out through shared memory, as bytes or as planes of bits.
#pragma once

// A warp's codes [kWM][kOut], which lie in `lines`, go out in pieces of 16 bytes.
template <class Where>
__device__ __forceinline__ void send(const unsigned char* lines, int lane, int row0, int rows, const Where& where) {
    constexpr int kPieces16 = kOut / 16;  // of a row
    __syncwarp();
#pragma unroll
    for (int first = 0; first < kWM * kPieces16; first += 32) {
        const int i = first + lane, row = i / kPieces16, piece = i % kPieces16;
        if ((kWM * kPieces16 % 32 == 0 || row < kWM) && row0 + row < rows) {
            if (unsigned char* to = where(row0 + row, 16 * piece)) {
                *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(lines + row * kLine + 16 * piece);
            }
        }
    }
}

#if OUT_BITS
// Bit `plane` of 32 codes. A number has eight: of four the bits in the lower halves of its bytes, of the next four in the higher
// ones. The product brings all eight into the highest byte: no two of its terms meet, so that nothing carries.
__device__ __forceinline__ uint32_t plane_of_pairs(const uint32_t (&pairs)[4], int plane) {
    uint32_t eight[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        eight[i] = (pairs[i] >> plane & 0x11111111u) * 0x01020408u;
    }
    return __byte_perm(__byte_perm(eight[0], eight[1], 0x73), __byte_perm(eight[2], eight[3], 0x73), 0x5410);
}

// The same as planes of bits, 32 columns a lane at a time; `first`: column of the first, `row_of`: where a row goes.
template <class RowOf>
__device__ __forceinline__ void send_bits(const unsigned char* lines, int lane, int row0, int rows, void* to, int first, int columns,
                                          int chunks, const RowOf& row_of) {
    __syncwarp();
    for (int i = lane; i < kWM * (kOut / 32); i += 32) {
        const int row = i / (kOut / 32), c = i % (kOut / 32) * 32;
        if (row0 + row < rows && first + c < columns) {
            const uint4* codes = reinterpret_cast<const uint4*>(lines + row * kLine + c);
            const uint4 left = codes[0], right = codes[1];
            const uint32_t pairs[4] = {left.x | left.y << 4, left.z | left.w << 4, right.x | right.y << 4, right.z | right.w << 4};
            const uint32_t high = plane_of_pairs(pairs, 1), low = plane_of_pairs(pairs, 0);
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
